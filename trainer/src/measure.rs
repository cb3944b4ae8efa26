//! Measured quality of a model on held-out tasks.
