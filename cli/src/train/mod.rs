//! `unmask train`: makes models. Absent from builds without the cargo feature `train`.

#[cfg_attr(feature = "train", path = "enabled.rs")]
#[cfg_attr(not(feature = "train"), path = "disabled.rs")]
mod stages;

pub use stages::run;
