//! What may be asked of an engine, and what it answers.

use crate::opening::Opening;
use crate::policy::Policy;
use thiserror::Error;

/// Longest prompt plus output one request may have, whatever the model's context (positions).
pub const POSITIONS_MAX: u32 = 1 << 20;
/// Largest block of models that keep what is before it (positions).
pub const BLOCK_SIZE_MAX: u32 = 64;
/// Largest block of models whose passes compute everything anyway (positions): Dream's authors decode an output as one.
pub const WHOLE_BLOCK_SIZE_MAX: u32 = 1024;
/// Most stop ids of one request.
pub const STOP_IDS_MAX: usize = 64;

/// Names a request for as long as the engine holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A request in token ids. Settings are complete: the engine resolves nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Chosen by the caller; must not be in use.
    pub id: RequestId,
    /// At least one token; none is needed where a text is edited, or before a suffix where rows score their own positions.
    pub prompt: Vec<u32>,
    /// What stands behind the output, which then has `max_tokens` positions: for models that read everything at once.
    pub suffix: Vec<u32>,
    /// How to decode.
    pub settings: Settings,
    /// Generated tokens of an earlier run that are final. Cut back to a block boundary; what is cut is
    /// decoded again, to the same tokens.
    pub committed: Vec<u32>,
    /// Passes the earlier run used, counted against the cap and in the report.
    pub passes_used: u32,
    /// Send [`Event::Draft`].
    pub drafts: bool,
    /// Larger is sooner.
    pub priority: i32,
    /// Among equal priorities the earlier is sooner, `None` last (milliseconds on the caller's clock; the engine
    /// only compares).
    pub deadline: Option<u64>,
    /// Requests share keys and values of equal prefixes only with requests of the same salt.
    pub salt: u64,
    /// A text to edit instead of one to generate.
    pub draft: Option<DraftText>,
    /// How the output must begin, where causal rows decide it.
    pub opening: Option<Opening>,
    /// Raw access for comparisons: any block size, and [`Event::Trace`] for every block.
    pub raw: bool,
}

impl Request {
    /// A request from the beginning, of ordinary priority, without drafts.
    pub fn new(id: RequestId, prompt: Vec<u32>, settings: Settings) -> Self {
        Self {
            id,
            prompt,
            suffix: Vec::new(),
            settings,
            committed: Vec::new(),
            passes_used: 0,
            drafts: false,
            priority: 0,
            deadline: None,
            salt: 0,
            draft: None,
            opening: None,
            raw: false,
        }
    }
}

/// A text to edit: `max_tokens` tokens, each of three lists as long. Nothing in it ends the request before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftText {
    /// Ids; meaningless where masked.
    pub tokens: Vec<u32>,
    /// Positions to be filled.
    pub masked: Vec<bool>,
    /// Positions that may not change.
    pub fixed: Vec<bool>,
}

/// Complete settings of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// Positions decoded together, or drafted ahead; ignored by [`Policy::Autoregressive`].
    pub block_size: u32,
    /// Which positions to fill.
    pub policy: Policy,
    /// How to draw a token.
    pub sampling: Sampling,
    /// Token ids that end the output; the model's end-of-sequence ids belong here too.
    pub stop_ids: Vec<u32>,
    /// Most passes, 0 for no cap.
    pub nfe_cap: u32,
    /// What else the authors of families do differently.
    pub manner: Manner,
}

impl Settings {
    /// Greedy, ended by the model's own end-of-sequence ids, without a cap on passes.
    pub fn new(max_tokens: u32, block_size: u32, policy: Policy) -> Self {
        Self {
            max_tokens,
            block_size,
            policy,
            sampling: Sampling::GREEDY,
            stop_ids: Vec::new(),
            nfe_cap: 0,
            manner: Manner::default(),
        }
    }

    /// Whether rows need their logits gathered.
    pub fn needs_logits(&self) -> bool {
        self.sampling.filters() || !self.manner.suppress.is_empty()
    }
}

/// What decides a decode beside the policy. By default the family's way, without a cache where that is not exact.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manner {
    /// How the output ends.
    pub ends: Option<Ends>,
    /// Positions of the open block that may fall together, left to right; 0 for all of them.
    pub sub_block: Option<u32>,
    /// Which keys and values are reused while a block is open.
    pub cache: Cache,
    /// Ids without a share in the probabilities, at most [`STOP_IDS_MAX`]: a confidence is that among the others.
    pub suppress: Vec<u32>,
    /// Whether such an id can win, with confidence 0 (LLaDA's `confidence_eos_eot_inf`).
    pub suppressed_win: bool,
}

/// Keys and values of an open block's surroundings that are not computed anew in each of its passes, though they would
/// differ (Fast-dLLM, section 3.1 and, within blocks, version 2). Those before a block-causal block never differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// None: every pass computes all rows that the open ones attend to. Exact.
    #[default]
    None,
    /// Of bidirectional models: what is before the block is as of the block's first pass.
    Prefix,
    /// What is before and behind the block, or the sub-block, is as of an earlier pass of the block.
    Dual,
}

/// How outputs end, a property of the family (section 5, "Ends").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The last block is decoded whole and cut (true), or shortened so that the canvas ends with the output.
    pub whole_last_block: bool,
    /// The first stop token with no mask before it ends the request at once, not at the end of its block.
    pub at_first_stop: bool,
}

/// Drawing one token from one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// In (0, 1]; 1 keeps everything.
    pub top_p: f32,
    /// 0 keeps everything.
    pub top_k: u32,
    /// Of the counter-based draws.
    pub seed: u64,
}

impl Sampling {
    /// The arg-max of every row.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };

    /// Whether draws leave some ids out.
    pub fn filters(&self) -> bool {
        self.temperature > 0.0 && (self.top_k > 0 || self.top_p < 1.0)
    }
}

/// A field and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// Path of the field.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The queue holds its limit.
    #[error("the queue is full ({queued} requests wait, limit {limit}): try again later")]
    QueueFull {
        /// Requests waiting.
        queued: usize,
        /// Limit of the queue.
        limit: usize,
    },
    /// The request could never run: it needs more key/value pages than exist.
    #[error("needs {needed} key/value pages, the cache has {total}: shorten the prompt or max_tokens")]
    TooLong {
        /// Pages the request needs.
        needed: usize,
        /// Pages of the cache.
        total: usize,
    },
    /// The id is in use.
    #[error("request id {0:?} is in use")]
    Duplicate(RequestId),
    /// Settings or ids the model cannot honour; all of them.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Invalid>),
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The model's end-of-sequence.
    Eos,
    /// A stop id of the request.
    Stop,
    /// `max_tokens`.
    Length,
    /// `nfe_cap`; the open block was dropped.
    NfeCap,
}

/// What a step did to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// State of the open block. Nothing in it is final.
    Draft {
        /// Whose.
        id: RequestId,
        /// Absolute position of the first token.
        first_position: u32,
        /// Tokens; meaningless where masked.
        tokens: Vec<u32>,
        /// Which positions are masked.
        masked: Vec<bool>,
        /// Denoise passes the block has had.
        step: u32,
    },
    /// Tokens that are part of the output for good.
    Commit {
        /// Whose.
        id: RequestId,
        /// Absolute position of the first token.
        first_position: u32,
        /// The stop token and what follows it are not among them.
        tokens: Vec<u32>,
        /// Passes the block took.
        steps: u32,
    },
    /// How a block came about (raw requests only).
    Trace {
        /// Whose.
        id: RequestId,
        /// Every fill and edit.
        trace: BlockTrace,
    },
    /// Deciding over the request panicked, which is a bug; it ended and holds nothing any more. The others go on.
    Failed {
        /// Whose.
        id: RequestId,
    },
    /// The request ended and holds nothing any more.
    Finished {
        /// Whose.
        id: RequestId,
        /// Why.
        reason: Reason,
        /// Passes whose rows decided tokens, those of an earlier run included.
        nfe: u32,
        /// Length of the prompt and what stands behind the output.
        prompt_tokens: u32,
        /// Tokens committed, those of an earlier run included.
        completion_tokens: u32,
    },
}

impl Event {
    /// Whose event it is.
    pub fn id(&self) -> RequestId {
        match self {
            Event::Draft { id, .. }
            | Event::Commit { id, .. }
            | Event::Trace { id, .. }
            | Event::Failed { id }
            | Event::Finished { id, .. } => *id,
        }
    }
}

/// Fills and edits of one block, in order of pass.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BlockTrace {
    /// Absolute position of the block's first token.
    pub first_position: u32,
    /// Every token of the block as it was left, prompt tokens included.
    pub tokens: Vec<u32>,
    /// Masks that fell.
    pub fills: Vec<Fill>,
    /// Filled positions that changed.
    pub edits: Vec<Edit>,
    /// Denoise (or decode) passes of the request when the block ended.
    pub passes: u32,
}

/// A mask that fell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fill {
    /// Absolute position.
    pub position: u32,
    /// The token first written.
    pub token: u32,
    /// Index of the denoise (or decode) pass within the request; -1 when it came from a prefill row.
    pub pass: i32,
    /// Probability of the token at that moment.
    pub confidence: f32,
}

/// A filled position that changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    /// Absolute position.
    pub position: u32,
    /// Token before.
    pub old: u32,
    /// Token after.
    pub new: u32,
    /// Index of the denoise pass within the request.
    pub pass: i32,
    /// Probability of the new token.
    pub confidence: f32,
}
