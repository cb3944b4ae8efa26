//! `unmask generate`: a client, with a cluster of its own when none is named.

use crate::args::GenerateArgs;
use crate::local::with_gateway;
use crate::output;
use crate::resume::Resuming;
use crate::screen::{Screen, Style, reason};
use crate::{INTERRUPTED, request};
use anyhow::{Context, bail};
use std::io::{IsTerminal, Read};
use std::process::ExitCode;
use std::time::Instant;
use unmask_proto::v1::Finish;
use unmask_proto::v1::generate_response::Event;

/// Columns of a terminal that does not say.
const COLUMNS: u16 = 80;

/// Runs the command.
///
/// # Errors
/// The services cannot start, or the gateway refuses the request.
pub fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let prompt = read_prompt(args.prompt.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async {
        tokio::select! {
            ended = generate(&args, &prompt) => ended,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(INTERRUPTED)),
        }
    });
    // Whatever still runs has nobody waiting for it.
    runtime.shutdown_background();
    ended
}

fn read_prompt(given: Option<&str>) -> anyhow::Result<String> {
    match given {
        Some(prompt) if prompt != "-" => Ok(prompt.to_owned()),
        None if std::io::stdin().is_terminal() => bail!("give a prompt, or pipe one in (see unmask generate --help)"),
        _ => {
            let mut prompt = String::new();
            std::io::stdin().read_to_string(&mut prompt).context("cannot read the prompt from standard input")?;
            Ok(prompt)
        }
    }
}

async fn generate(args: &GenerateArgs, prompt: &str) -> anyhow::Result<ExitCode> {
    let drafts = style(args) != Style::Plain;
    if args.endpoint.is_empty() {
        // A cluster of our own has one model, whatever the folder was called.
        let request = request::build(args, prompt, "", drafts);
        let ask = async |client| stream(args, prompt, Resuming::new(vec![client], request)).await;
        with_gateway(&args.model, ask).await?;
    } else {
        let request = request::build(args, prompt, args.model.model.as_deref().unwrap_or_default(), drafts);
        stream(args, prompt, Resuming::through(&args.endpoint, &args.tls, request)?).await?;
    }
    Ok(ExitCode::SUCCESS)
}

fn style(args: &GenerateArgs) -> Style {
    if args.json {
        return Style::Json;
    }
    if !std::io::stdout().is_terminal() {
        return Style::Plain;
    }
    let (_, columns) = console::Term::stdout().size_checked().unwrap_or((0, COLUMNS));
    Style::Terminal { columns: usize::from(columns).max(1) }
}

async fn stream(args: &GenerateArgs, prompt: &str, mut events: Resuming) -> anyhow::Result<()> {
    let mut screen = Screen::new(style(args));
    let started = Instant::now();
    let mut begun = false;
    loop {
        match events.next().await {
            Ok(event) => {
                // Nothing of a request that is refused is shown.
                if !std::mem::replace(&mut begun, true) {
                    output::out(&screen.prompt(prompt))?;
                }
                output::out(&screen.event(&event))?;
                if let Event::Finish(finish) = &event {
                    if !args.quiet {
                        output::note(&summary(finish, started.elapsed().as_secs_f64()));
                    }
                    return Ok(());
                }
            }
            Err(error) => {
                output::out(&screen.broken_off())?;
                return Err(error);
            }
        }
    }
}

fn summary(finish: &Finish, seconds: f64) -> String {
    let tokens = finish.usage.map_or(0, |usage| usage.completion_tokens);
    let serving = finish.total_time_us as f64 / 1e6;
    let rate = f64::from(tokens) / if serving > 0.0 { serving } else { seconds }.max(1e-9);
    format!(
        "{tokens} tokens in {seconds:.2} s ({rate:.0} tokens/s), {} passes, TPF {:.2}, first block after {:.0} ms, ended \
         by {}",
        finish.nfe,
        finish.tokens_per_forward,
        finish.time_to_first_block_us as f64 / 1e3,
        reason(finish)
    )
}
