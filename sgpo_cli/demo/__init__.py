"""The demo world: the lost-property office of a small harbour town, made on the spot.

`world` writes letters and answers, `scorer` judges an answer by rule, `teacher` mends one,
`model` makes a small untrained language model. Nothing here knows a stage, a file format or TRL.
"""
