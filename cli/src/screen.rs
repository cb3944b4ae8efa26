//! What to print for each event of a stream: a pure state, so that it can be tested without a terminal.

use serde_json::{Value, json};
use unmask_gateway::policy::{self, number};
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{Commit, Draft, Finish, FinishReason, Started};

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";
/// Erases from the cursor to the end of the screen.
const ERASE_BELOW: &str = "\x1b[J";

/// How to show a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Committed text stays, the open block is redrawn after it.
    Terminal {
        /// Characters of a line.
        columns: usize,
    },
    /// Text as it is committed.
    Plain,
    /// A JSON object per event.
    Json,
}

/// What has been printed.
#[derive(Debug)]
pub struct Screen {
    style: Style,
    /// Column of the cursor after everything that stays.
    column: usize,
    /// Column of the cursor after the open block, and lines it went down, while one is drawn.
    drawn: Option<usize>,
}

impl Screen {
    /// Nothing printed.
    pub fn new(style: Style) -> Self {
        Self { style, column: 0, drawn: None }
    }

    /// The prompt, before the first event.
    pub fn prompt(&mut self, prompt: &str) -> String {
        match self.style {
            Style::Terminal { .. } => {
                self.advance(prompt);
                format!("{DIM}{prompt}{PLAIN}")
            }
            Style::Plain => prompt.to_owned(),
            Style::Json => String::new(),
        }
    }

    /// What an event adds.
    pub fn event(&mut self, event: &Event) -> String {
        if self.style == Style::Json {
            return format!("{}\n", to_json(event));
        }
        match event {
            Event::Started(_) => String::new(),
            Event::Draft(draft) => self.draft(&draft.text),
            Event::Commit(commit) => self.stay(&commit.text),
            Event::Finish(finish) => {
                let rest = self.stay(&finish.text);
                let end = if self.column == 0 { "" } else { "\n" };
                if matches!(self.style, Style::Terminal { .. }) { format!("{rest}{end}") } else { rest + "\n" }
            }
        }
    }

    /// Ends a stream that broke off: nothing of the open block stays.
    pub fn broken_off(&mut self) -> String {
        let erased = self.erase();
        if matches!(self.style, Style::Terminal { .. }) && self.column > 0 { erased + "\n" } else { erased }
    }

    fn stay(&mut self, text: &str) -> String {
        let erased = self.erase();
        self.advance(text);
        erased + text
    }

    fn draft(&mut self, text: &str) -> String {
        let Style::Terminal { columns } = self.style else { return String::new() };
        let erased = self.erase();
        let (lines, _) = travel(self.column, text, columns);
        self.drawn = Some(lines);
        format!("{erased}{DIM}{text}{PLAIN}")
    }

    /// Back to the end of what stays, with everything behind it erased.
    fn erase(&mut self) -> String {
        let Some(lines) = self.drawn.take() else { return String::new() };
        let up = if lines > 0 { format!("\x1b[{lines}A") } else { String::new() };
        let right = if self.column > 0 { format!("\x1b[{}C", self.column) } else { String::new() };
        format!("{up}\r{right}{ERASE_BELOW}")
    }

    fn advance(&mut self, text: &str) {
        if let Style::Terminal { columns } = self.style {
            self.column = travel(self.column, text, columns).1;
        }
    }
}

/// Lines down and final column of a cursor that starts in `column` and prints `text`. A character that would not fit
/// goes to the next line. Wide characters are taken for one column: they are rare in code.
fn travel(mut column: usize, text: &str, columns: usize) -> (usize, usize) {
    let mut lines = 0;
    for c in text.chars() {
        if c == '\n' {
            (lines, column) = (lines + 1, 0);
            continue;
        }
        if column >= columns {
            (lines, column) = (lines + 1, 0);
        }
        column += if c == '\t' { 8 - column % 8 } else { 1 };
    }
    (lines, column)
}

/// An event as JSON, field names as in the protocol.
pub fn to_json(event: &Event) -> Value {
    match event {
        Event::Started(Started { request_id, model, prompt_tokens, settings, numerics_id, first_position }) => {
            let settings = settings.clone().unwrap_or_default();
            let origins: serde_json::Map<String, Value> =
                settings.origins.into_iter().map(|(key, origin)| (key, origin.into())).collect();
            json!({ "started": {
                "request_id": request_id, "model": model, "prompt_tokens": prompt_tokens,
                "first_position": first_position, "numerics_id": numerics_id,
                "settings": {
                    "max_tokens": settings.max_tokens, "block_size": settings.block_size,
                    "policy": settings.policy.map(policy::to_json), "temperature": number(settings.temperature),
                    "top_p": number(settings.top_p), "top_k": settings.top_k, "seed": settings.seed, "stop": settings.stop,
                    "stop_token_ids": settings.stop_token_ids, "time_limit_ms": settings.time_limit_ms,
                    "nfe_cap": settings.nfe_cap, "policy_revision": settings.policy_revision, "origins": origins,
                },
            }})
        }
        Event::Draft(Draft { first_position, token_ids, masked, step, text }) => json!({ "draft": {
            "first_position": first_position, "token_ids": token_ids, "masked": masked, "step": step, "text": text,
        }}),
        Event::Commit(Commit { first_position, token_ids, text, steps, group_id, epoch }) => json!({ "commit": {
            "first_position": first_position, "token_ids": token_ids, "text": text, "steps": steps,
            "group_id": group_id, "epoch": epoch,
        }}),
        Event::Finish(finish) => {
            let usage = finish.usage.unwrap_or_default();
            json!({ "finish": {
                "reason": reason(finish), "nfe": finish.nfe, "tokens_per_forward": number(finish.tokens_per_forward),
                "usage": { "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens },
                "time_to_first_block_us": finish.time_to_first_block_us, "total_time_us": finish.total_time_us,
                "blocks_recomputed": finish.blocks_recomputed, "policy_revision": finish.policy_revision,
                "text": finish.text,
            }})
        }
    }
}

/// Lower-case name of why a stream ended.
pub fn reason(finish: &Finish) -> &'static str {
    match finish.reason() {
        FinishReason::Eos => "eos",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::NfeCap => "nfe_cap",
        FinishReason::TimeLimit => "time_limit",
        FinishReason::Unspecified => "unspecified",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(text: &str) -> Event {
        Event::Draft(Draft { text: text.into(), ..Draft::default() })
    }

    fn commit(text: &str) -> Event {
        Event::Commit(Commit { text: text.into(), ..Commit::default() })
    }

    #[test]
    fn plain_text_holds_no_drafts_and_no_escapes() {
        let mut screen = Screen::new(Style::Plain);
        let mut all = screen.prompt("def f():\n");
        for event in [draft("░░"), commit("    return"), draft("░"), commit(" 1")] {
            all += &screen.event(&event);
        }
        all += &screen.event(&Event::Finish(Finish { text: "\n".into(), ..Finish::default() }));
        assert_eq!(all, "def f():\n    return 1\n\n");
    }

    #[test]
    fn a_draft_is_erased_before_what_follows_it() {
        let mut screen = Screen::new(Style::Terminal { columns: 80 });
        assert_eq!(screen.prompt("ab"), format!("{DIM}ab{PLAIN}"));
        assert_eq!(screen.event(&draft("x\n░")), format!("{DIM}x\n░{PLAIN}"));
        // One line up, to the third column, everything behind erased.
        assert_eq!(screen.event(&commit("x\ny")), "\x1b[1A\r\x1b[2C\x1b[Jx\ny");
        assert_eq!(screen.event(&draft("░")), format!("{DIM}░{PLAIN}"));
        assert_eq!(screen.event(&Event::Finish(Finish::default())), "\r\x1b[1C\x1b[J\n");
    }

    #[test]
    fn long_lines_wrap_where_the_terminal_does() {
        assert_eq!(travel(0, "abcd", 4), (0, 4));
        assert_eq!(travel(0, "abcde", 4), (1, 1));
        assert_eq!(travel(3, "ab\n", 4), (2, 0));
        assert_eq!(travel(0, "\tx", 80), (0, 9));
    }

    #[test]
    fn json_is_one_object_per_line() {
        let mut screen = Screen::new(Style::Json);
        assert_eq!(screen.prompt("x"), "");
        let line = screen.event(&commit("a\nb"));
        assert_eq!(line.lines().count(), 1);
        assert!(line.contains("\"commit\"") && line.ends_with('\n'));
    }
}
