//! What a worker says of its model, and the files gateways need of it.

use crate::mapping;
use sha2::{Digest as _, Sha256};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;
use unmask_engine::Model;
use unmask_proto::v1::{Capabilities, Defaults, FetchTokenizerResponse, InfillTokens, ModelDescriptor};

/// Largest file of a tokenizer (bytes).
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Largest quality.json (bytes).
const QUALITY_BYTES_MAX: u64 = 256 << 10;

/// Why a model's tokenizer files cannot be served.
#[derive(Debug, Error)]
pub enum TokenizerFilesError {
    /// A file is missing or unreadable.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is too large.
    #[error("{path} has {bytes} bytes, at most {FILE_BYTES_MAX} are taken")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A file is not what it should be.
    #[error("{path}: {why}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Tokenizer and chat template, as they are in the model's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenizerFiles {
    tokenizer: Vec<u8>,
    config: Vec<u8>,
    chat_template: String,
    /// SHA-256, hexadecimal, of the three, each after its length: gateways cache by it.
    pub digest: String,
}

impl TokenizerFiles {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` where they exist.
    pub(crate) fn read(folder: &Path) -> Result<Self, TokenizerFilesError> {
        let tokenizer_path = folder.join("tokenizer.json");
        let tokenizer = read(&tokenizer_path)?.ok_or_else(|| TokenizerFilesError::Read {
            path: tokenizer_path,
            source: io::Error::new(io::ErrorKind::NotFound, "is missing: gateways need it to encode text"),
        })?;
        let config_path = folder.join("tokenizer_config.json");
        let config = read(&config_path)?.unwrap_or_default();
        let template_path = folder.join("chat_template.jinja");
        let chat_template = match read(&template_path)? {
            Some(bytes) => String::from_utf8(bytes)
                .map_err(|error| TokenizerFilesError::Content { path: template_path, why: error.to_string() })?,
            None => template_in(&config)
                .map_err(|why| TokenizerFilesError::Content { path: config_path, why })?
                .unwrap_or_default(),
        };
        let digest = digest([&tokenizer, &config, chat_template.as_bytes()]);
        Ok(Self { tokenizer, config, chat_template, digest })
    }

    pub(crate) fn has_chat_template(&self) -> bool {
        !self.chat_template.is_empty()
    }

    pub(crate) fn response(&self) -> FetchTokenizerResponse {
        FetchTokenizerResponse {
            tokenizer_json: self.tokenizer.clone(),
            tokenizer_config_json: self.config.clone(),
            chat_template: self.chat_template.clone(),
        }
    }
}

/// A file's bytes; `None` when there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerFilesError> {
    let failed = |source| TokenizerFilesError::Read { path: path.to_owned(), source };
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if bytes > FILE_BYTES_MAX {
        return Err(TokenizerFilesError::TooLarge { path: path.to_owned(), bytes });
    }
    std::fs::read(path).map(Some).map_err(failed)
}

/// The chat template inside a `tokenizer_config.json`: a string, or a list of which `default` counts.
fn template_in(config: &[u8]) -> Result<Option<String>, String> {
    if config.is_empty() {
        return Ok(None);
    }
    let config: serde_json::Value = serde_json::from_slice(config).map_err(|error| error.to_string())?;
    let template = match &config["chat_template"] {
        serde_json::Value::Array(named) => {
            named.iter().find(|one| one["name"] == "default").map_or(&serde_json::Value::Null, |one| &one["template"])
        }
        one => one,
    };
    Ok(template.as_str().map(str::to_owned))
}

fn digest(files: [&[u8]; 3]) -> String {
    let mut hasher = Sha256::new();
    for file in files {
        hasher.update((file.len() as u64).to_le_bytes());
        hasher.update(file);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The descriptor of a loaded model.
pub(crate) fn describe(model: &Model, tokenizer: &TokenizerFiles) -> ModelDescriptor {
    let config = model.config();
    let capabilities = Capabilities {
        diffusion: config.can_diffuse(),
        autoregressive: config.can_autoregress(),
        infill: config.infill.as_ref().map(|infill| InfillTokens {
            prefix: infill.prefix,
            suffix: infill.suffix,
            middle: infill.middle,
        }),
        edit: config.edit,
        heal: config.heal,
        infill_by_masks: config.infill.is_none() && config.fills_between(),
        chat: tokenizer.has_chat_template(),
    };
    let defaults = Defaults {
        block_size: config.decode.block_size,
        policy: Some(mapping::policy_to(&config.decode.policy)),
        max_tokens: config.decode.max_tokens,
        temperature: config.decode.temperature,
    };
    ModelDescriptor {
        name: config.name.clone(),
        architecture: config.architecture.clone(),
        tokenizer_digest: tokenizer.digest.clone(),
        numerics_id: model.numerics_id().to_owned(),
        context_length: config.context_length,
        block_sizes: config.block_sizes.clone(),
        vocab_size: config.tokenizer_size,
        mask_token_id: config.mask_id,
        eos_token_ids: config.eos_ids.clone(),
        capabilities: Some(capabilities),
        defaults: Some(defaults),
        parameters: model.parameters(),
        dtype: model.dtype().name().to_owned(),
    }
}

/// Measured quality of the model, as its folder has it; empty when there is none, or too much.
pub(crate) fn quality(folder: &Path) -> String {
    let path = folder.join("quality.json");
    let small = path.metadata().is_ok_and(|meta| meta.len() <= QUALITY_BYTES_MAX);
    if small { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::fs;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn the_template_comes_from_its_own_file_or_the_config() {
        let read = |files: &[(&str, &str)]| TokenizerFiles::read(folder(files).path()).map(|files| files.chat_template);
        let tokenizer = ("tokenizer.json", "{}");
        assert_eq!(read(&[tokenizer]).unwrap(), "");
        let config = ("tokenizer_config.json", r#"{"chat_template": "A"}"#);
        assert_eq!(read(&[tokenizer, config]).unwrap(), "A");
        assert_eq!(read(&[tokenizer, config, ("chat_template.jinja", "B")]).unwrap(), "B");
        let list = r#"{"chat_template": [{"name": "x", "template": "C"}, {"name": "default", "template": "D"}]}"#;
        assert_eq!(read(&[tokenizer, ("tokenizer_config.json", list)]).unwrap(), "D");
        assert!(matches!(read(&[]), Err(TokenizerFilesError::Read { .. })));
        let broken = read(&[tokenizer, ("tokenizer_config.json", "{")]);
        assert!(matches!(broken, Err(TokenizerFilesError::Content { .. })), "{broken:?}");
    }

    #[test]
    fn the_digest_depends_on_every_file_and_where_they_end() {
        let digests = [digest([b"a", b"b", b""]), digest([b"ab", b"", b""]), digest([b"a", b"", b"b"])];
        assert!(digests[0] != digests[1] && digests[1] != digests[2] && digests[0] != digests[2]);
        assert_eq!(digests[0].len(), 64);
    }
}
