"""The golden ratio and its inverse, correctly rounded to float64."""

PHI: float = 1.6180339887498948482
PHI_INV: float = 0.6180339887498948482
