//! Runs the mask stage from a TOML file with the sections `[data]` and `[stage]`.

use std::path::Path;

use unmask_trainer::recipe;

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let Some(file) = std::env::args().nth(1) else { anyhow::bail!("usage: train_mask CONFIG.toml") };
    let summary = recipe::mask(recipe::read(Path::new(&file))?)?;
    tracing::info!(
        "{} steps, {} tokens, {:.0} s: {}",
        summary.steps,
        summary.tokens,
        summary.seconds,
        summary.model.display()
    );
    Ok(())
}
