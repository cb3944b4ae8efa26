//! End-to-end tests, and the rules of the tree.
//!
//! The tests live in `tests/`; `golden/` holds reference data computed by other implementations (its README
//! defines the format).
