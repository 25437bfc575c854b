"""The tiny world: rendered scenes, prompts about them, and an oracle that checks one against the other.

The default profile trains and evaluates here, on a laptop. A picture is 64 x 64 px and shows one or two coloured shapes
on a white, grey or black background, flat or glossy: 6 colours, 5 shapes, 2 sizes, 4 spatial relations.

scenes.py     `Scene` and `SceneObject`: what a picture shows, as data; `sample_scene` draws one at random.
renderer.py   `render(scene, rng)`: a scene as (64, 64, 3) uint8 RGB pixels, at random positions.
language.py   Two ways to describe a scene. Rich prompts, as people write, use synonyms, other word orders and filler:
                  imagine a purple disc of huge size on the left of a disc, yellow and large, on a white wall, matte
              Plain captions have one fixed form:
                  a large purple circle left of a large yellow circle on a white background, flat
              `parse` reads both into `Claims`; `reword` turns a rich prompt into its plain caption.
oracle.py     `Oracle`: finds the objects in an image by colour segmentation and reports which claims of the prompt
              hold. It learns nothing and passes no gradient, so no training run can optimise it.
recipe/       Trains every weight in data/tiny: a small Stable Diffusion and five reward models. Run by
              `textcraftor tiny-build`; the weights ship with the repository, so nobody has to.

Why two languages: the base model is trained almost only on plain captions, the rewards on both. The UNet can therefore
draw what its text encoder fails to express for rich prompts, and that gap is what tuning the text encoder closes.
"""
