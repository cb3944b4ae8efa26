//! The Edit method: a text in pieces to a draft of tokens, and a stream of commits to what changed. Pure.

use crate::validate::{self, PRIORITY_MAX};
use unmask_proto::rich::Violation;
use unmask_proto::v1::edit_response::Event;
use unmask_proto::v1::edit_span::Content;
use unmask_proto::v1::generate_response::Event as Generated;
use unmask_proto::v1::policy::{JointEdit, Kind};
use unmask_proto::v1::{
    Decoding, DraftText, EditCommit, EditFinish, EditRequest, EditResponse, EditStarted, ModelDescriptor, Policy,
    ResolvedSettings, TokenChange,
};
use unmask_text::{Specials, TextError, Tokenizer};

/// Most pieces of a text.
const SPANS_MAX: usize = 4096;
/// Numbers where neither request nor model says.
const POLICY: JointEdit = JointEdit { tau: 0.9, tau_edit: 0.9, max_post_steps: 16 };

/// A request that can be served.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Valid {
    pub pieces: Vec<Piece>,
    /// Complete but for the number of tokens.
    pub settings: ResolvedSettings,
    pub priority: i32,
}

/// A piece of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Given.
    Text { text: String, immutable: bool },
    /// Room for so many tokens.
    Masks(u32),
}

impl Valid {
    /// Bytes to encode.
    pub(crate) fn text_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| if let Piece::Text { text, .. } = piece { text.len() } else { 0 }).sum()
    }
}

/// Checks a request against its model.
///
/// # Errors
/// Every violation at once.
pub(crate) fn validate(request: EditRequest, model: &ModelDescriptor) -> Result<Valid, Vec<Violation>> {
    let mut found = Vec::new();
    let mut require = |ok: bool, field: &str, description: String| {
        if !ok {
            found.push(Violation::new(field, description));
        }
    };
    let count = request.spans.len();
    require((1..=SPANS_MAX).contains(&count), "spans", format!("must be 1 to {SPANS_MAX} pieces, are {count}"));
    let mut pieces = Vec::new();
    for (at, span) in request.spans.into_iter().take(SPANS_MAX).enumerate() {
        match span.content {
            Some(Content::Text(text)) => pieces.push(Piece::Text { text, immutable: span.immutable }),
            Some(Content::Masks(masks)) => {
                let fits = (1..=model.context_length).contains(&masks);
                let most = model.context_length;
                require(fits, &format!("spans[{at}].masks"), format!("must be 1 to {most}, is {masks}"));
                let description = "cannot hold for masks: they are there to be filled".into();
                require(!span.immutable, &format!("spans[{at}].immutable"), description);
                pieces.push(Piece::Masks(masks));
            }
            None => require(false, &format!("spans[{at}]"), "is empty: give text or masks".into()),
        }
    }
    let masks: u64 =
        pieces.iter().map(|piece| if let Piece::Masks(count) = piece { u64::from(*count) } else { 0 }).sum();
    let most = model.context_length;
    require(
        masks <= u64::from(most),
        "spans",
        format!("hold {masks} masks, must be at most the model's context of {most}"),
    );
    let priority = request.priority.unwrap_or(0);
    let within = (-PRIORITY_MAX..=PRIORITY_MAX).contains(&priority);
    require(within, "priority", format!("must be from -{PRIORITY_MAX} to {PRIORITY_MAX}, is {priority}"));
    let decoding = Decoding {
        block_size: request.block_size.or_else(|| own_block_size(model)),
        policy: Some(Policy { kind: Some(Kind::JointEdit(request.policy.unwrap_or_else(|| own_policy(model)))) }),
        temperature: Some(0.0),
        time_limit_ms: request.time_limit_ms,
        nfe_cap: request.nfe_cap,
        ..Decoding::default()
    };
    let resolved = validate::settings_of(&decoding, model);
    let settings = resolved.unwrap_or_else(|violations| {
        let named = |violation: Violation| match violation.field.strip_prefix("decoding.") {
            Some(field) => Violation::new(field, violation.description),
            None => violation,
        };
        found.extend(violations.into_iter().map(named));
        ResolvedSettings::default()
    });
    if found.is_empty() { Ok(Valid { pieces, settings, priority }) } else { Err(found) }
}

/// That of the model's defaults; where they decode without blocks the smallest one, in which most is put right.
fn own_block_size(model: &ModelDescriptor) -> Option<u32> {
    let defaults = model.defaults.as_ref()?;
    match defaults.policy.and_then(|policy| policy.kind) {
        Some(Kind::SelfSpeculative(_) | Kind::Autoregressive(_)) => model.block_sizes.iter().copied().min(),
        _ => Some(defaults.block_size),
    }
}

fn own_policy(model: &ModelDescriptor) -> JointEdit {
    match model.defaults.and_then(|defaults| defaults.policy).and_then(|policy| policy.kind) {
        Some(Kind::JointEdit(policy)) => policy,
        _ => POLICY,
    }
}

/// The draft of a text, each piece encoded by itself.
///
/// # Errors
/// The tokenizer refuses a piece.
pub(crate) fn encode(tokenizer: &Tokenizer, pieces: &[Piece]) -> Result<DraftText, TextError> {
    let mut draft = DraftText::default();
    for piece in pieces {
        let (ids, masked, fixed) = match piece {
            Piece::Text { text, immutable } => (tokenizer.encode(text, Specials::AsText, false)?, false, *immutable),
            Piece::Masks(count) => (vec![0; *count as usize], true, false),
        };
        draft.masked.extend(ids.iter().map(|_| masked));
        draft.fixed.extend(ids.iter().map(|_| fixed));
        draft.token_ids.extend(ids);
    }
    Ok(draft)
}

/// What has come of a text so far.
#[derive(Debug)]
pub(crate) struct Changes {
    draft: DraftText,
    changed: u32,
    tokens: u32,
}

impl Changes {
    pub(crate) fn new(draft: DraftText) -> Self {
        Self { draft, changed: 0, tokens: 0 }
    }

    /// An event of the text's stream, as those who edit see it.
    pub(crate) fn event(&mut self, event: Generated) -> Option<EditResponse> {
        let event = match event {
            Generated::Started(started) => Event::Started(EditStarted {
                request_id: started.request_id,
                model: started.model,
                tokens: self.draft.token_ids.len() as u32,
                settings: started.settings,
            }),
            Generated::Commit(commit) => {
                let changes: Vec<TokenChange> = (commit.first_position..)
                    .zip(&commit.token_ids)
                    .filter_map(|(position, &new)| self.change(position, new))
                    .collect();
                self.changed += changes.len() as u32;
                self.tokens += commit.token_ids.len() as u32;
                let (first_position, steps) = (commit.first_position, commit.steps);
                Event::Commit(EditCommit {
                    first_position,
                    token_ids: commit.token_ids,
                    text: commit.text,
                    changes,
                    steps,
                })
            }
            Generated::Finish(finish) => Event::Finish(EditFinish {
                reason: finish.reason,
                tokens: self.tokens,
                changed: self.changed,
                nfe: finish.nfe,
                total_time_us: finish.total_time_us,
                text: finish.text,
            }),
            Generated::Draft(_) => return None,
        };
        Some(EditResponse { event: Some(event) })
    }

    fn change(&self, position: u32, new: u32) -> Option<TokenChange> {
        let at = position as usize;
        let old = (!self.draft.masked.get(at)?).then_some(*self.draft.token_ids.get(at)?);
        (old != Some(new)).then_some(TokenChange { position, old, new })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use unmask_proto::v1::{Capabilities, Commit, Defaults, EditSpan, Finish};

    fn model(edit: bool) -> ModelDescriptor {
        ModelDescriptor {
            name: "m".into(),
            context_length: 64,
            block_sizes: vec![4, 8],
            vocab_size: 300,
            capabilities: Some(Capabilities { diffusion: true, edit, ..Capabilities::default() }),
            defaults: Some(Defaults { block_size: 8, ..Defaults::default() }),
            ..ModelDescriptor::default()
        }
    }

    fn span(content: Content, immutable: bool) -> EditSpan {
        EditSpan { content: Some(content), immutable }
    }

    fn fields(request: EditRequest, edit: bool) -> Vec<String> {
        validate(request, &model(edit)).unwrap_err().into_iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn every_violation_comes_at_once_under_the_requests_own_names() {
        let spans = vec![span(Content::Masks(0), true), EditSpan::default()];
        let policy = Some(JointEdit { tau: 2.0, ..POLICY });
        let wrong = EditRequest { spans, policy, block_size: Some(5), priority: Some(999), ..EditRequest::default() };
        let expected = ["spans[0].masks", "spans[0].immutable", "spans[1]", "priority", "block_size"];
        assert_eq!(fields(wrong, true)[..5], expected);
        assert_eq!(fields(EditRequest::default(), true), ["spans"]);
        // Each fits the context, all together do not.
        let masks = EditRequest { spans: vec![span(Content::Masks(64), false); SPANS_MAX], ..EditRequest::default() };
        assert_eq!(fields(masks, true), ["spans"]);
        let fine = EditRequest { spans: vec![span(Content::Text("x".into()), false)], ..EditRequest::default() };
        assert_eq!(fields(fine.clone(), false), ["policy"]);
        let valid = validate(fine, &model(true)).unwrap();
        assert_eq!(valid.settings.policy.unwrap().kind, Some(Kind::JointEdit(POLICY)));
        assert_eq!((valid.settings.block_size, valid.settings.temperature), (8, 0.0));
    }

    #[test]
    fn changes_are_counted_and_filled_masks_have_no_old_token() {
        let mut changes = Changes::new(DraftText {
            token_ids: vec![5, 6, 0, 8],
            masked: vec![false, false, true, false],
            fixed: vec![true, false, false, false],
        });
        let commit = Commit { first_position: 0, token_ids: vec![5, 9, 7, 8], ..Commit::default() };
        let Some(EditResponse { event: Some(Event::Commit(commit)) }) = changes.event(Generated::Commit(commit)) else {
            panic!()
        };
        let change = |position, old, new| TokenChange { position, old, new };
        assert_eq!(commit.changes, [change(1, Some(6), 9), change(2, None, 7)]);
        let finish = changes.event(Generated::Finish(Finish::default())).unwrap().event.unwrap();
        assert!(matches!(finish, Event::Finish(finish) if (finish.tokens, finish.changed) == (4, 2)));
    }
}
