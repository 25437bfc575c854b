"use strict"
const $ = id => document.getElementById(id)
const CHAIN = ["switch_at", "guidance_scale"]
let studio, waiting, drawing = false, again = false

const sliders = () => [...document.querySelectorAll("#encoders input")]

function settings() {
  const weights = Object.fromEntries(sliders().map(each => [each.dataset.name, Number(each.value)]).filter(([, weight]) => weight))
  const chain = Object.fromEntries(CHAIN.map(name => [name, Number($(name).value)]))
  return {prompt: $("prompt").value, seed: Number($("seed").value), weights, ...chain}
}

function show(values) {
  $("prompt").value = values.prompt
  $("seed").value = values.seed
  for (const each of sliders()) each.value = values.weights[each.dataset.name] || 0
  for (const name of CHAIN) $(name).value = values[name]
  label()
}

function label() {
  for (const each of document.querySelectorAll("input[type=range]")) each.nextElementSibling.textContent = Number(each.value).toFixed(2)
  $("original").textContent = (1 - sliders().reduce((sum, each) => sum + Number(each.value), 0)).toFixed(2)
}

function say(text, fault = false) {
  $("state").textContent = text
  $("state").classList.toggle("fault", fault)
}

async function ask(path, body) {
  const answer = await fetch(path, {method: "POST", body})
  const found = await answer.json()
  if (!answer.ok) throw new Error(found.error)
  return found
}

// One picture at a time: what changed meanwhile is drawn next.
async function draw(note = "") {
  if (drawing) { again = true; return }
  if (!$("settings").reportValidity()) return
  drawing = true
  const started = performance.now()
  say("drawing …")
  try {
    const found = await ask("/draw", JSON.stringify(settings()))
    $("base").src = found.base
    $("blend").src = $("download").href = found.blend
    $("command").textContent = found.command
    $("snippet").textContent = found.snippet
    say([`${((performance.now() - started) / 1000).toFixed(1)} s`, found.note, note].filter(Boolean).join(" · "))
  } catch (error) {
    say(error.message, true)
  } finally {
    drawing = false
    document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1
  }
  if (again) { again = false; draw() }
}

function changed() {
  label()
  clearTimeout(waiting)
  waiting = setTimeout(draw, 200)
}

async function restore(file) {
  if (!file) return
  try {
    const found = await ask("/restore", file)
    show(found.settings)
    draw(found.note || "restored from " + file.name)
  } catch (error) {
    say(error.message, true)
  }
}

function slider(name) {
  const row = document.createElement("div"), text = document.createElement("label"), input = document.createElement("input")
  row.className = "slider"
  text.textContent = name
  text.htmlFor = input.id = "encoder-" + name
  Object.assign(input, {type: "range", min: -0.5, max: 1.5, step: 0.05, value: 0})
  input.dataset.name = name
  row.append(text, input, document.createElement("output"))
  return row
}

async function start() {
  studio = await (await fetch("/studio.json")).json()
  $("encoders").append(...studio.encoders.map(slider))
  if (studio.size < 256) for (const image of [$("base"), $("blend")]) image.classList.add("small")
  const first = {prompt: $("prompt").value, seed: 0, weights: Object.fromEntries(studio.encoders.slice(0, 1).map(name => [name, 1])),
    switch_at: studio.switch_at, guidance_scale: studio.guidance_scale}
  show(first)
  $("settings").addEventListener("input", event => { if (event.target.type !== "file") changed() })
  $("settings").addEventListener("submit", event => event.preventDefault())
  $("reset").addEventListener("click", () => { show(first); draw() })
  $("file").addEventListener("change", event => restore(event.target.files[0]))
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText($(button.dataset.copy).textContent); say("copied") }
    catch { getSelection().selectAllChildren($(button.dataset.copy)); say("selected: copy it with Ctrl-C") }
  })
  addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("over") })
  addEventListener("dragleave", () => document.body.classList.remove("over"))
  addEventListener("drop", event => {
    event.preventDefault()
    document.body.classList.remove("over")
    restore(event.dataTransfer.files[0])
  })
  draw()
}

start()
