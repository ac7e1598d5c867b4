"""Adaptive search over settings: the answer of a grid for a part of its images.

Two things save images. *Search*: which settings are tried at all is Optuna's choice (`search`),
from what the earlier ones gave. *Racing*: every setting gets the same few prompts first; those
that are clearly beaten on these very prompts get no more, the others get twice as many, and so on
(`race`). What is made are ordinary trials of an ordinary study, so nothing is done twice, and
`show`, `recommend` and `report` read a tuned study like any other.

`space` has the axes and their grids, `race` the rules (pure), `search` Optuna's part, `journal` its
file and locks, `session` the loop, `lab` what turns wishes into trials, `document` the answer.
"""
