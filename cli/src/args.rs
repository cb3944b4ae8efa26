//! What may be typed.

use crate::edit::EditArgs;
use crate::models::OverrideArgs;
use crate::policy::PolicyArgs;
use crate::profile::ProfileArgs;
use crate::request::PolicyArg;
use crate::service::{ControllerArgs, GatewayArgs, WorkerArgs};
use crate::tls::ClientTlsArgs;
use crate::verify::VerifyArgs;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use unmask_engine::Reach;
use unmask_kernels::WeightType;

/// Serves and makes diffusion language models.
#[derive(Debug, Parser)]
#[command(name = "unmask", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a completion, block by block
    #[command(after_help = "Examples:
  unmask generate \"def sum_of_squares(numbers):\"
  unmask generate --block-size 32 --policy threshold=0.7 \"def is_prime(n):\"
  unmask generate --endpoint http://127.0.0.1:7700 --json \"def fib(n):\"
  echo \"def reverse_string(text):\" | unmask generate")]
    Generate(GenerateArgs),
    /// Repair a file, its number of tokens kept, and show what changed
    #[command(after_help = "Examples:
  unmask edit broken.py
  unmask edit broken.py --keep 1-3 --write
  echo 'def twice(x): return ??' | unmask edit - --hole '??'")]
    Edit(EditArgs),
    /// Run everything on this machine
    #[command(after_help = "Examples:
  unmask up
  unmask up --http 127.0.0.1:8000
  unmask up --port 0 --json --model models/python-tasks-3m")]
    Up(UpArgs),
    /// Run a gateway
    #[command(after_help = "Example:
  unmask gateway --listen 127.0.0.1:7700 --http 127.0.0.1:7780 --controller 127.0.0.1:7701")]
    Gateway(GatewayArgs),
    /// Draw an API key for a gateway's tenant
    #[command(after_help = "Example:\n  unmask key")]
    Key,
    /// Run a controller
    #[command(after_help = "Example:\n  unmask controller --listen 127.0.0.1:7701 --store embedded:/var/lib/unmask")]
    Controller(ControllerArgs),
    /// Run a worker
    #[command(after_help = "Example:
  unmask worker --listen 127.0.0.1:7702 --controller 127.0.0.1:7701 --model models/python-tasks-3m")]
    Worker(WorkerArgs),
    /// Run one rank of a worker's model, in a process of its own
    #[command(after_help = "Example, two ranks of one model:
  unmask worker --controller 127.0.0.1:7701 --rank-addresses 127.0.0.1:7710,127.0.0.1:7711
  unmask rank --rank 1 --addresses 127.0.0.1:7710,127.0.0.1:7711")]
    Rank(crate::service::RankArgs),
    /// Show a model's configuration, every value with its origin
    #[command(after_help = "Example:\n  unmask inspect models/python-tasks-3m")]
    Inspect(InspectArgs),
    /// Read a GGUF file, or write a model for other programs: as GGUF, or as a Qwen3 folder
    #[cfg(feature = "train")]
    #[command(after_help = crate::convert::EXAMPLES)]
    Convert(crate::convert::ConvertArgs),
    /// Write the raw head rows of given token ids
    #[command(after_help = "Example:\n  unmask logits --model DIR --ids 1,2,3 --reach causal --out logits.safetensors")]
    Logits(LogitsArgs),
    /// Decode given token ids, with the pass and confidence of every commit
    #[command(after_help = "Examples:
  unmask decode --model DIR --ids 1,2,3 --params '{\"max_tokens\": 32, \"threshold\": 0.9}' --json
  unmask decode --model DIR --ids 1,2,3 --loop sdar --params '{\"gen_length\": 16, \"denoising_steps\": 4, \"remasking_strategy\": \"low_confidence_static\"}'")]
    Decode(DecodeArgs),
    /// Compare with reference data in the format golden/1
    #[command(after_help = "Example:\n  unmask verify tests/golden/*/ --out actual")]
    Verify(VerifyArgs),
    /// Measure speed
    Bench(crate::bench::BenchArgs),
    /// Measure step time, and draw tokens per second against block size
    #[command(after_help = "Example:\n  unmask profile --model models/python-tasks-3m --out target/profile")]
    Profile(ProfileArgs),
    /// Look at a cluster: workers, groups, epochs, load, policies
    #[command(after_help = "Example:\n  unmask status --controller 127.0.0.1:7701")]
    Status(crate::control::StatusArgs),
    /// Say what is wanted of a model: workers of the pool become groups that serve it
    #[command(after_help = crate::apply::EXAMPLES)]
    Apply(crate::apply::ApplyArgs),
    /// Make a worker finish what it holds and leave
    #[command(after_help = "Example:\n  unmask drain 127.0.0.1:7702 --controller 127.0.0.1:7701")]
    Drain(crate::control::DrainArgs),
    /// Look at the choice of block size, and steer it
    Policy(PolicyArgs),
    /// Measure a served model: pass rate, passes and speed on tasks, infill and real code, with a report
    #[cfg(feature = "train")]
    #[command(after_help = crate::eval::EXAMPLES)]
    Eval(crate::eval::EvalArgs),
    /// Make a model
    Train(TrainArgs),
}

/// Type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 4 bytes a weight
    F32,
    /// 2 bytes a weight
    Bf16,
    /// 1 byte a weight and a scale per output feature
    Int8,
}

impl Dtype {
    /// As the kernels name it.
    pub fn weights(self) -> WeightType {
        match self {
            Dtype::F32 => WeightType::F32,
            Dtype::Bf16 => WeightType::Bf16,
            Dtype::Int8 => WeightType::Int8,
        }
    }
}

/// How far rows attend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReachArg {
    /// To themselves
    Causal,
    /// To the end of their block
    #[value(name = "block_causal")]
    BlockCausal,
    /// To the end of the sequence
    Bidirectional,
}

impl ReachArg {
    /// As the engine names it.
    pub fn reach(self) -> Reach {
        match self {
            ReachArg::Causal => Reach::Causal,
            ReachArg::BlockCausal => Reach::Block,
            ReachArg::Bidirectional => Reach::Bidirectional,
        }
    }
}

/// Where and how the model of a local cluster runs.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Folder or name of the model; the bundled one when absent
    #[arg(long)]
    pub model: Option<String>,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    /// Threads of the forward pass; 0 for all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// What the checkpoint does not say
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

/// `unmask generate`
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// What to continue; `-` or nothing reads standard input
    pub prompt: Option<String>,
    /// Ask a gateway instead of starting one in this process; with several, the next goes on when one is lost
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub endpoint: Vec<String>,
    /// Of the gateway's link
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// The model, and how it runs in this process
    #[command(flatten)]
    pub model: ModelArgs,
    /// Take the prompt as a user's message and render the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Text after the gap to fill; where masks fill it, --max-tokens is its length
    #[arg(long)]
    pub suffix: Option<String>,
    /// Most tokens to generate
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Positions decoded together
    #[arg(long)]
    pub block_size: Option<u32>,
    /// threshold=TAU, fixed=STEPS, factor=F, entropy=NATS, hierarchical=LOW,HIGH, joint-edit=TAU,TAU_EDIT,POST_STEPS,
    /// self-speculative=TAU or autoregressive
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<PolicyArg>,
    /// 0 is greedy
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Smallest set of this probability
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Best tokens to draw from
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Of the draws
    #[arg(long)]
    pub seed: Option<u64>,
    /// Text to stop before; may be repeated
    #[arg(long)]
    pub stop: Vec<String>,
    /// Wall clock of the request
    #[arg(long, value_name = "MS")]
    pub time_limit_ms: Option<u64>,
    /// Forward passes the request may use
    #[arg(long)]
    pub nfe_cap: Option<u32>,
    /// Print every event as a JSON object per line
    #[arg(long)]
    pub json: bool,
    /// No summary
    #[arg(long, short)]
    pub quiet: bool,
}

/// `unmask up`
#[derive(Debug, Args)]
pub struct UpArgs {
    /// The model, and how it runs
    #[command(flatten)]
    pub model: ModelArgs,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port of the gateway; controller and worker take the two after it. 0 takes free ones
    #[arg(long, default_value_t = 7700)]
    pub port: u16,
    /// host:port of the OpenAI-compatible HTTP interface; default: 7780 on the host of --host, a free port with --port 0
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,
    /// Folder of the controller's state; default: unmask under the user's state folder
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Listen on a --host that other machines reach. Links are plain, so everybody on the network must be trusted: they
    /// can read everything, and pass for any service
    #[arg(long)]
    pub insecure: bool,
    /// Print the endpoints as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// `unmask inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Folder or name of the model
    pub model: String,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// What the checkpoint does not say
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

/// `unmask logits`
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// Folder or name of the model
    #[arg(long)]
    pub model: String,
    /// Token ids
    #[arg(long, value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// How far rows attend; default: as the model's finished rows
    #[arg(long, value_enum)]
    pub reach: Option<ReachArg>,
    /// Block size of block_causal; default: the model's
    #[arg(long)]
    pub block_size: Option<u32>,
    /// File to write: tensor `logits`, f32, (rows, vocab)
    #[arg(long)]
    pub out: PathBuf,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// What the checkpoint does not say
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

/// `unmask decode`
#[derive(Debug, Args)]
pub struct DecodeArgs {
    /// Folder or name of the model
    #[arg(long)]
    pub model: String,
    /// Prompt ids
    #[arg(long, value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// Parameters as a JSON object
    #[arg(long, default_value = "{}")]
    pub params: String,
    /// Whose decoding loop, such as sdar or llada2_edit; default: the model's authors'
    #[arg(long = "loop", value_name = "NAME")]
    pub decoding_loop: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// What the checkpoint does not say
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

/// `unmask train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// What to make
    #[command(subcommand)]
    pub stage: TrainCommand,
}

/// What to make.
#[derive(Debug, Subcommand)]
pub enum TrainCommand {
    /// Train a tokenizer
    #[command(after_help = "Example:\n  unmask train tokenizer --config models/recipe/tokenizer.toml")]
    Tokenizer(ConfigArgs),
    /// Write generated tasks with tests, one JSON object per line
    #[command(after_help = "Example:\n  unmask train tasks --held-out --count 1000 --out held-out.jsonl")]
    Tasks(TasksArgs),
    /// First stage: fill masks
    #[command(after_help = "Example:\n  unmask train mask --config models/recipe/mask.toml")]
    Mask(ConfigArgs),
    /// Third stage: learn from the best of many sampled orders of filling
    #[command(after_help = "Example:\n  unmask train order --config models/recipe/order.toml")]
    Order(ConfigArgs),
    /// Last stage: learn from the model's own shortest paths to programs that pass their tests
    #[command(
        name = "on-policy",
        after_help = "Example:\n  unmask train on-policy --config models/recipe/on-policy.toml"
    )]
    OnPolicy(ConfigArgs),
    /// Measure a model on tasks: pass rate and tokens per pass
    #[command(after_help = "Example:
  unmask train measure --model models/python-tasks-3m --tasks held-out.jsonl --block-sizes 1,16 --thresholds 0.9,0.7")]
    Measure(MeasureArgs),
    /// Measure how a model judges visible tokens: repairs, false edits, calibration
    #[command(after_help = "Example:\n  unmask train repair --model models/python-tasks-3m --json")]
    Repair(RepairArgs),
}

/// `unmask train repair`
#[derive(Debug, Args)]
pub struct RepairArgs {
    /// Folder or name of the model
    #[arg(long)]
    pub model: String,
    /// Held-out programs
    #[arg(long, default_value_t = 500)]
    pub documents: usize,
    /// Block sizes
    #[arg(long, value_delimiter = ',', default_value = "4,8,16,32")]
    pub block_sizes: Vec<usize>,
    /// Edits per token
    #[arg(long, default_value_t = 0.05)]
    pub edits: f64,
    /// A visible token changes when another is likelier than this
    #[arg(long, default_value_t = 0.9)]
    pub tau_edit: f32,
    /// As a JSON array
    #[arg(long)]
    pub json: bool,
}

/// A stage's settings.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Settings as TOML
    #[arg(long)]
    pub config: PathBuf,
}

/// `unmask train tasks`
#[derive(Debug, Args)]
pub struct TasksArgs {
    /// File to write
    #[arg(long)]
    pub out: PathBuf,
    /// How many
    #[arg(long, default_value_t = 1000)]
    pub count: u64,
    /// Of the draws
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Tasks whose skeletons are never in training
    #[arg(long)]
    pub held_out: bool,
}

/// `unmask train measure`
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// Folder or name of the model
    #[arg(long)]
    pub model: String,
    /// Tasks in HumanEval's format
    #[arg(long)]
    pub tasks: PathBuf,
    /// Most tasks to take
    #[arg(long)]
    pub limit: Option<usize>,
    /// Block sizes; 1 is the autoregressive baseline
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,16,32")]
    pub block_sizes: Vec<u32>,
    /// Confidence thresholds
    #[arg(long, value_delimiter = ',', default_value = "0.95,0.9,0.8,0.7,0.5")]
    pub thresholds: Vec<f32>,
    /// Probabilities with which drafts must be right (`self_speculative`)
    #[arg(long, value_delimiter = ',', value_name = "TAU")]
    pub self_speculative: Vec<f32>,
    /// Let visible tokens of the open block change when another is likelier than this (`joint_edit`)
    #[arg(long, conflicts_with = "write")]
    pub tau_edit: Option<f32>,
    /// With `--tau-edit`: passes that may follow the fall of a block's last mask
    #[arg(long, default_value_t = 0, requires = "tau_edit")]
    pub post_steps: u32,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    /// Also cut the prompts of this many tasks at every character, and count what becomes a running function: decoded
    /// as the one way asked for, else as the model's defaults
    #[arg(long, default_value_t = 0)]
    pub cuts: usize,
    /// Write the cut prompts that did not become running functions, one JSON object per line
    #[arg(long, requires = "cuts")]
    pub failures: Option<PathBuf>,
    /// Write `quality.json` into the model's folder
    #[arg(long)]
    pub write: bool,
    /// Print JSON as `quality.json` has it
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_example_in_the_help_parses() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().filter_map(|line| line.trim().strip_prefix("unmask ")) {
                let words = line.split(' ').map(|word| word.trim_matches(['"', '\''])).take(2);
                let parsed = Cli::try_parse_from(["unmask"].into_iter().chain(words));
                let fine = parsed.is_ok() || !parsed.unwrap_err().to_string().contains("unrecognized");
                assert!(fine, "{line}");
            }
        }
    }
}
