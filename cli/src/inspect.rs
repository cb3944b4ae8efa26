//! `unmask inspect`: a model's configuration, every value with its origin.

use crate::args::InspectArgs;
use crate::{models, output};
use std::fmt::Write;
use std::process::ExitCode;
use unmask_engine::model::ModelConfig;
use unmask_engine::model::weights::Weights;

/// Runs the command.
///
/// # Errors
/// The model cannot be read, or is not supported.
pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let dir = models::find(Some(&args.model))?;
    let config = ModelConfig::load(&dir, &args.overrides.overrides())?;
    let weights = Weights::open(&dir)?;
    weights.check(&config)?;
    let tensors = weights.tensors()?;
    let parameters: usize = tensors.values().map(|view| view.shape().iter().product::<usize>()).sum();
    if args.json {
        let listed: Vec<_> = tensors
            .iter()
            .map(|(name, view)| {
                let dtype = format!("{:?}", view.dtype()).to_lowercase();
                serde_json::json!({ "name": name, "shape": view.shape(), "dtype": dtype })
            })
            .collect();
        let all = serde_json::json!({
            "name": config.name, "family": config.family.name(), "parameters": parameters,
            "entries": config.entries(), "tensors": listed,
        });
        output::out(&format!("{all:#}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text =
        format!("{} ({}), {parameters} parameters in {} tensors\n\n", config.name, config.family.name(), tensors.len());
    let width = config.entries().iter().map(|entry| entry.key.len()).max().unwrap_or(0);
    for entry in config.entries() {
        let _ = writeln!(text, "{:width$}  {}  [{}]", entry.key, entry.value, entry.origin);
    }
    output::out(&text)?;
    Ok(ExitCode::SUCCESS)
}
