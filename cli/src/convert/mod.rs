//! `unmask convert`: models from and to other programs' formats. It needs the cargo feature `train`, which brings candle
//! and its block formats.
//!
//! - [`gguf`]: the header of a GGUF file, read without trusting it
//! - [`quants`], [`tensors`]: how tensors are stored, and writing them one at a time
//! - [`names`]: what tensors are called, and which rows differ
//! - [`pre`], [`vocabulary`]: tokenizers
//! - [`import`]: a GGUF file becomes a model folder
//! - [`export`], [`writer`]: a checkpoint becomes a Qwen3 folder or a GGUF file
//! - [`pad`]: a small model at the size of a large one

pub mod export;
pub mod gguf;
pub mod import;
pub mod names;
pub mod pad;
pub mod pre;
pub mod quants;
pub mod tensors;
pub mod vocabulary;
pub mod writer;

#[cfg(test)]
mod tests;

use crate::bench::shapes::Named;
use crate::{models, output};
use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tensors::{Target, Tensor};
use unmask_kernels::map_read_only;
use unmask_trainer::checkpoint::atomically;

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
  unmask convert --to qwen3 python-tasks-3m python-tasks-3m-qwen3
  unmask convert --to gguf python-tasks-3m python-tasks-3m.gguf
  unmask convert --pad qwen3-0.6b python-tasks-3m models/padded";

/// `unmask convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A GGUF file, or folder or name of a model
    pub from: String,
    /// What to write: a folder for a GGUF file and for qwen3, a file for gguf
    pub out: PathBuf,
    /// What a model becomes; a GGUF file becomes a folder of its own architecture
    #[arg(long, value_enum)]
    pub to: Option<To>,
    /// The same model at a larger size (qwen3-0.6b, smollm2-135m): zeros fill what is added, so that it writes the same, in the
    /// time of such a model
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["to", "dtype"])]
    pub pad: Option<String>,
    /// Type of the matrices; default: as they are stored, bf16 where that is a quantised type
    #[arg(long, value_enum)]
    pub dtype: Option<MatrixType>,
    /// Replace what is there
    #[arg(long)]
    pub force: bool,
    /// What was written, as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// What a model becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// A folder that other programs read as Qwen3
    Qwen3,
    /// A GGUF file, for llama.cpp
    Gguf,
}

/// Type of matrices that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MatrixType {
    /// 4 bytes a weight: every bit of a quantised one
    F32,
    /// 2 bytes a weight
    Bf16,
}

impl MatrixType {
    fn target(self) -> Target {
        match self {
            MatrixType::F32 => Target::F32,
            MatrixType::Bf16 => Target::Bf16,
        }
    }
}

/// What was written.
#[derive(Debug, serde::Serialize)]
pub struct Summary {
    architecture: String,
    parameters: usize,
    tensors: usize,
    /// Tensors by the type that the source stores them in.
    stored: BTreeMap<&'static str, usize>,
    /// Bytes of weights written.
    bytes: usize,
}

impl Summary {
    fn new(architecture: &str, tensors: &[Tensor<'_>]) -> Summary {
        let mut stored = BTreeMap::new();
        for tensor in tensors {
            *stored.entry(quants::name(tensor.kind)).or_default() += 1;
        }
        Summary {
            architecture: architecture.to_owned(),
            parameters: tensors.iter().map(Tensor::values).sum(),
            tensors: tensors.len(),
            stored,
            bytes: tensors.iter().map(Tensor::size).sum(),
        }
    }

    fn line(&self, out: &Path) -> String {
        let stored: Vec<String> = self.stored.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let Summary { architecture, parameters, tensors, bytes, .. } = self;
        let megabytes = *bytes as f64 / 1e6;
        let from = stored.join(", ");
        let out = out.display();
        format!(
            "wrote {out}: {architecture}, {parameters} parameters in {tensors} tensors ({from}), {megabytes:.1} MB\n"
        )
    }
}

/// Runs the command.
///
/// # Errors
/// The source cannot be read or has no form in the other format; the result exists already or cannot be written.
pub fn run(args: &ConvertArgs) -> anyhow::Result<ExitCode> {
    let target = args.dtype.map(MatrixType::target);
    let from = Path::new(&args.from);
    let summary = if let Some(shape) = &args.pad {
        let sizes = Named::find(shape).context("--pad")?.sizes;
        let dir = models::find(Some(&args.from))?;
        folder(&args.out, args.force, |out| pad::write_padded(&dir, sizes, out))?
    } else if is_gguf(from)? {
        ensure!(args.to.is_none(), "--to: a GGUF file becomes a folder of its own architecture; leave it out");
        let file = map_read_only(from).with_context(|| format!("cannot read {}", from.display()))?;
        folder(&args.out, args.force, |dir| {
            import::import(&file, target, dir).with_context(|| from.display().to_string())
        })?
    } else {
        let Some(to) = args.to else {
            bail!("{} is no GGUF file: say --to qwen3 or --to gguf, or --pad with a size", args.from)
        };
        let dir = models::find(Some(&args.from))?;
        let checkpoint = export::Checkpoint::open(&dir)?;
        match to {
            To::Qwen3 => folder(&args.out, args.force, |out| checkpoint.write_folder(&dir, target, out))?,
            To::Gguf => file(&args.out, args.force, |out| checkpoint.write_gguf(&dir, target, out))?,
        }
    };
    if args.json {
        let mut said = serde_json::to_value(&summary)?;
        said["out"] = args.out.display().to_string().into();
        output::out(&format!("{said}\n"))?;
    } else {
        output::out(&summary.line(&args.out))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether `path` is a file that begins as GGUF files do, or is called like one.
fn is_gguf(path: &Path) -> anyhow::Result<bool> {
    if !path.is_file() {
        let called = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        ensure!(!called, "cannot read {}: there is no such file", path.display());
        return Ok(false);
    }
    let mut magic = [0; 4];
    let opened = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    ensure!(opened.is_ok() && &magic == gguf::MAGIC, "{} is no GGUF file, and no model's folder", path.display());
    Ok(true)
}

/// Lets `fill` make a folder, which appears as a whole or not at all.
fn folder<T>(out: &Path, force: bool, fill: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
    if out.exists() {
        ensure!(force, "{} exists: --force replaces it", out.display());
        // What is replaced is deleted: only what this program could have written.
        let model = out.is_dir() && out.join("config.json").is_file();
        ensure!(model, "{} exists and is no model's folder: choose another", out.display());
    }
    let mut made = None;
    atomically(out, |dir| {
        made = Some(fill(dir)?);
        Ok(())
    })?;
    made.context("nothing was written")
}

/// Lets `fill` write a file, which appears as a whole or not at all.
fn file<T>(
    out: &Path,
    force: bool,
    fill: impl FnOnce(&mut BufWriter<&mut std::fs::File>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    ensure!(!out.is_dir(), "{} is a folder: name the file to write", out.display());
    ensure!(force || !out.exists(), "{} exists: --force replaces it", out.display());
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let mut temporary = tempfile::Builder::new().prefix(".writing-").tempfile_in(parent)?;
    let mut buffered = BufWriter::new(temporary.as_file_mut());
    let made = fill(&mut buffered)?;
    buffered.flush().with_context(|| format!("cannot write {}", out.display()))?;
    drop(buffered);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(temporary.path(), std::fs::Permissions::from_mode(0o644))?;
    }
    temporary.persist(out).with_context(|| format!("cannot write {}", out.display()))?;
    Ok(made)
}

/// A bar of bytes; nothing where standard error is no terminal.
fn progress(tensors: &[Tensor<'_>]) -> anyhow::Result<ProgressBar> {
    let bytes: usize = tensors.iter().map(Tensor::size).sum();
    let style = ProgressStyle::with_template("weights {wide_bar} {bytes}/{total_bytes} {eta}")?;
    Ok(ProgressBar::new(bytes as u64).with_style(style))
}

/// The shortest decimal of an f32 as an f64, so that 1e-6 is written as 1e-6.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
