"""Meta: the original release of Llama. Its model-parallel parts are consolidated.00.pth, consolidated.01.pth ...,
params.json gives the sizes. Only a source.

Every part has all names. Of a matrix that is split it holds as many rows or columns as any other part; of a norm, all.
Heads of q and k are stored as (pair, half).

- names:  names of the tensors
- params: params.json
- folder: reading a folder: settings, parts, layout
- layout: the layout of a folder
- source: a folder opened for a conversion
"""
