"""What a run's predictions are worth: scores, calibration, refusal, views, ensembles, folds, foreign data."""
