"""Proof that loaded weights compute what their own libraries compute: `python -m vit_flax.convert --parity`.

case.py holds what a case is; google.py, huggingface.py, timm.py and meta.py each hold a literal list `CASES`. Reference
libraries are imported inside functions only, so that a case whose library is absent costs nothing and is said to be so.
"""
