"""How fast the model is here: `python -m vit_flax.benchmark`. It needs jax, flax, optax, numpy and absl-py only.

__main__   the command: which cases, in which order, what is printed
cases      one case of ours: a model and a way to run it, compiled
measure    cases that take turns; the machine's own matmul rate; memory
peers      the same case in timm, transformers and Keras, each in a process of its own
report     rows and the Markdown table
"""
