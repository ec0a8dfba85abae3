"""The three-level evaluation: rank classification, generation, metrics, averages, the report.

What enters: a bench folder (`data/bench/`) and a model behind `language_model.LanguageModel`. What leaves:
`tasks/<file>.json` per task, `report.json`, `report.md` and plots.
Only `open_model.py`, which loads the real model, imports torch.
"""
