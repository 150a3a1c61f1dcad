"""The differential count of a smear, with intervals that know how the classifier errs."""
