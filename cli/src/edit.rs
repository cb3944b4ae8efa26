//! `unmask edit`: repairs a file by the Edit method and shows what changed.

use crate::INTERRUPTED;
use crate::args::ModelArgs;
use crate::local::{Gateway, gateway, with_gateway};
use crate::output;
use crate::tls::ClientTlsArgs;
use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use similar::TextDiff;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use unmask_proto::v1::edit_response::Event;
use unmask_proto::v1::edit_span::Content;
use unmask_proto::v1::policy::JointEdit;
use unmask_proto::v1::{EditFinish, EditRequest, EditSpan, FinishReason, TokenChange};

/// Largest file (bytes).
const FILE_BYTES_MAX: usize = 4 << 20;

/// `unmask edit`
#[derive(Debug, Args)]
pub struct EditArgs {
    /// The file to repair; `-` reads standard input
    pub file: PathBuf,
    /// Ask a gateway instead of starting one in this process
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Of the gateway's link
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// The model, and how it runs in this process
    #[command(flatten)]
    pub model: ModelArgs,
    /// Lines that must not change, from 1: `3` or `3-7`, several with commas
    #[arg(long, value_delimiter = ',', value_parser = lines)]
    pub keep: Vec<RangeInclusive<usize>>,
    /// What stands in the file for room to be filled
    #[arg(long, value_name = "TEXT")]
    pub hole: Option<String>,
    /// Tokens that each hole has room for
    #[arg(long, default_value_t = 4, requires = "hole")]
    pub hole_tokens: u32,
    /// Positions decoded together
    #[arg(long)]
    pub block_size: Option<u32>,
    /// Probability above which another token takes a place
    #[arg(long)]
    pub tau_edit: Option<f32>,
    /// Write the result to the file instead of showing a diff
    #[arg(long, conflicts_with = "json")]
    pub write: bool,
    /// The result and every change as JSON
    #[arg(long)]
    pub json: bool,
}

fn lines(text: &str) -> Result<RangeInclusive<usize>, String> {
    let number = |text: &str| text.parse::<usize>().ok().filter(|&line| line > 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!("{text:?} is not a line or a range of lines such as 3-7")),
    }
}

/// What came of a text.
struct Edited {
    text: String,
    changes: Vec<TokenChange>,
    finish: EditFinish,
}

/// Runs the command.
///
/// # Errors
/// The file cannot be read, the services cannot start, or the gateway refuses the request.
pub fn run(args: &EditArgs) -> anyhow::Result<ExitCode> {
    let text = read(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async {
        tokio::select! {
            edited = edit(args, &text) => edited.and_then(|edited| show(args, &text, &edited)),
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(INTERRUPTED)),
        }
    });
    runtime.shutdown_background();
    ended
}

fn read(args: &EditArgs) -> anyhow::Result<String> {
    let name = args.file.display();
    let mut bytes = Vec::new();
    let most = FILE_BYTES_MAX as u64 + 1;
    if args.file.as_os_str() == "-" {
        ensure!(!args.write, "--write needs a file to write to");
        std::io::stdin().take(most).read_to_end(&mut bytes).context("cannot read standard input")?;
    } else {
        let file = std::fs::File::open(&args.file).with_context(|| format!("cannot read {name}"))?;
        file.take(most).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    }
    ensure!(bytes.len() <= FILE_BYTES_MAX, "{name} is larger than {FILE_BYTES_MAX} bytes");
    String::from_utf8(bytes).with_context(|| format!("{name} is not UTF-8 text"))
}

/// The text in pieces: lines to keep, holes, and the rest.
fn spans(args: &EditArgs, text: &str) -> Vec<EditSpan> {
    let mut spans: Vec<EditSpan> = Vec::new();
    let mut push = |text: &str, immutable: bool| {
        if let Some(EditSpan { content: Some(Content::Text(before)), immutable: same }) = spans.last_mut()
            && *same == immutable
        {
            before.push_str(text);
        } else if !text.is_empty() {
            spans.push(EditSpan { content: Some(Content::Text(text.to_owned())), immutable });
        }
    };
    for (index, line) in text.split_inclusive('\n').enumerate() {
        push(line, args.keep.iter().any(|range| range.contains(&(index + 1))));
    }
    let Some(hole) = args.hole.as_deref().filter(|hole| !hole.is_empty()) else { return spans };
    let cut = |span: EditSpan| {
        let Some(Content::Text(text)) = span.content else { return Vec::new() };
        let mut parts = Vec::new();
        for (index, part) in text.split(hole).enumerate() {
            if index > 0 {
                parts.push(EditSpan { content: Some(Content::Masks(args.hole_tokens)), immutable: false });
            }
            if !part.is_empty() {
                parts.push(EditSpan { content: Some(Content::Text(part.to_owned())), immutable: span.immutable });
            }
        }
        parts
    };
    spans.into_iter().flat_map(cut).collect()
}

async fn edit(args: &EditArgs, text: &str) -> anyhow::Result<Edited> {
    let request = EditRequest {
        model: args.endpoint.as_ref().and(args.model.model.clone()).unwrap_or_default(),
        spans: spans(args, text),
        block_size: args.block_size,
        policy: args.tau_edit.map(|tau_edit| JointEdit { tau: 0.9, tau_edit, max_post_steps: 16 }),
        ..EditRequest::default()
    };
    match &args.endpoint {
        Some(endpoint) => ask(gateway(endpoint, &args.tls)?, request).await,
        None => with_gateway(&args.model, async |client| ask(client, request).await).await,
    }
}

async fn ask(mut client: Gateway, request: EditRequest) -> anyhow::Result<Edited> {
    let mut events = client.edit(request).await?.into_inner();
    let (mut text, mut changes) = (String::new(), Vec::new());
    while let Some(response) = events.message().await? {
        match response.event {
            Some(Event::Commit(commit)) => {
                text += &commit.text;
                changes.extend(commit.changes);
            }
            Some(Event::Finish(finish)) => {
                text += &finish.text;
                return Ok(Edited { text, changes, finish });
            }
            Some(Event::Started(_)) | None => {}
        }
    }
    bail!("the stream ended without a finish")
}

fn show(args: &EditArgs, before: &str, edited: &Edited) -> anyhow::Result<ExitCode> {
    let Edited { text, changes, finish } = edited;
    ensure!(finish.reason() == FinishReason::Length, "a cap ended it early: nothing is written");
    if args.json {
        let changes: Vec<Value> =
            changes.iter().map(|c| json!({ "position": c.position, "old": c.old, "new": c.new })).collect();
        let all = json!({ "text": text, "tokens": finish.tokens, "passes": finish.nfe, "changes": changes });
        output::out(&format!("{all:#}\n"))?;
    } else if args.write {
        if text != before {
            std::fs::write(&args.file, text).with_context(|| format!("cannot write {}", args.file.display()))?;
        }
    } else {
        let name = args.file.display().to_string();
        let diff = TextDiff::from_lines(before, text);
        output::out(&diff.unified_diff().header(&name, &format!("{name} (edited)")).to_string())?;
    }
    let (changed, tokens) = (finish.changed, finish.tokens);
    output::note(&format!("{changed} of {tokens} tokens changed in {} passes; their number stays", finish.nfe));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: EditArgs,
    }

    fn pieces(arguments: &[&str], text: &str) -> Vec<(String, bool)> {
        let args = Only::try_parse_from(["edit", "f"].iter().chain(arguments)).unwrap().args;
        let name = |content| match content {
            Some(Content::Text(text)) => text,
            Some(Content::Masks(masks)) => format!("<{masks}>"),
            None => String::new(),
        };
        spans(&args, text).into_iter().map(|span| (name(span.content), span.immutable)).collect()
    }

    #[test]
    fn lines_to_keep_and_holes_become_pieces() {
        let text = "a\nb\nc ?? d\n??";
        assert_eq!(pieces(&[], text), [(text.into(), false)]);
        assert_eq!(
            pieces(&["--keep", "1-2", "--hole", "??", "--hole-tokens", "3"], text),
            [
                ("a\nb\n".into(), true),
                ("c ".into(), false),
                ("<3>".into(), false),
                (" d\n".into(), false),
                ("<3>".into(), false)
            ]
        );
        assert!(Only::try_parse_from(["edit", "f", "--keep", "7-3"]).is_err());
    }
}
