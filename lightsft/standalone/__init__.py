"""What runs where lightsft is not installed: these files are copied into exported folders, and import torch and
transformers alone.

`model.py` is the model; every other file holds what one kind of part computes, when it is built from numbers and
placed on a model. A part of a strategy says which of these classes stands for it (`Part.standalone`); its file is then
copied along. So a strategy from elsewhere can bring its own.
"""
