//! Tokenizers by digest, fetched once from a worker that has them.

use crate::route::Route;
use crate::routes::RETRY_AFTER;
use crate::upstream::{Upstream, Verdict, judge, with_sources};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;
use tonic::{Code, Status};
use unmask_proto::rich;
use unmask_proto::v1::FetchTokenizerResponse;
use unmask_text::Tokenizer;

/// Most tokenizers kept; the one unused for the longest time goes first.
const TOKENIZERS_MAX: usize = 16;

/// Most groups that are asked for one tokenizer.
const GROUPS_ASKED_MAX: usize = 3;

type Entry = Arc<OnceCell<Arc<Tokenizer>>>;

/// Tokenizers, the last used one at the end.
#[derive(Default)]
pub(crate) struct Tokenizers(Mutex<Vec<(String, Entry)>>);

impl Tokenizers {
    fn entry(&self, digest: &str) -> Entry {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|(known, _)| known == digest);
        let entry = found.map_or_else(|| (digest.to_owned(), Entry::default()), |at| kept.remove(at));
        if kept.len() >= TOKENIZERS_MAX {
            kept.remove(0);
        }
        let cell = Arc::clone(&entry.1);
        kept.push(entry);
        cell
    }

    /// The tokenizer of a route's model, from its worker or another that has it. Those who ask for the same one at once wait for one fetch.
    ///
    /// # Errors
    /// UNAVAILABLE when no worker sends it; INTERNAL when what it sends is not what it said.
    pub(crate) async fn get(&self, route: &Route, upstream: &Upstream) -> Result<Arc<Tokenizer>, Status> {
        let digest = &route.model.tokenizer_digest;
        let cell = self.entry(digest);
        let tokenizer = cell
            .get_or_try_init(|| async {
                let files = fetch(route, upstream).await?;
                let built = tokio::task::spawn_blocking(move || build(&files)).await;
                let tokenizer = built.map_err(|error| bad(&with_sources(&error)))??;
                if tokenizer.digest() != digest {
                    return Err(bad(&format!("its digest is {}, {digest} was announced", tokenizer.digest())));
                }
                tracing::info!(model = route.model.name, digest, "fetched the tokenizer");
                Ok(Arc::new(tokenizer))
            })
            .await?;
        Ok(Arc::clone(tokenizer))
    }
}

/// Asks one group after the other, the route's first.
async fn fetch(route: &Route, upstream: &Upstream) -> Result<FetchTokenizerResponse, Status> {
    let table = upstream.routes.table();
    let same = |other: &&Route| other.model.tokenizer_digest == route.model.tokenizer_digest;
    let others = table.routes.iter().map(Arc::as_ref).filter(same).filter(|other| other.group != route.group);
    let mut last = String::new();
    for route in [route].into_iter().chain(others).take(GROUPS_ASKED_MAX) {
        match upstream.workers.fetch_tokenizer(route, &upstream.routes).await {
            Ok(files) => return Ok(files),
            Err(status) => {
                if judge(&status) == Verdict::Broken {
                    route.broke();
                }
                tracing::warn!(group = route.group, %status, "fetching the tokenizer");
                last = status.message().to_owned();
            }
        }
    }
    let message = format!("no group sends the model's tokenizer; the last one: {last}");
    Err(rich::retryable(Code::Unavailable, "NO_TOKENIZER", message, RETRY_AFTER))
}

fn build(files: &FetchTokenizerResponse) -> Result<Tokenizer, Status> {
    let FetchTokenizerResponse { tokenizer_json, tokenizer_config_json, chat_template } = files;
    Tokenizer::from_files(tokenizer_json, Some(tokenizer_config_json), Some(chat_template))
        .map_err(|error| bad(&error.to_string()))
}

fn bad(why: &str) -> Status {
    rich::status(Code::Internal, "BAD_TOKENIZER", format!("the model's tokenizer cannot be used: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_first() {
        let tokenizers = Tokenizers::default();
        let first = tokenizers.entry("0");
        for i in 1..TOKENIZERS_MAX {
            tokenizers.entry(&i.to_string());
        }
        assert!(Arc::ptr_eq(&first, &tokenizers.entry("0")));
        tokenizers.entry("new");
        assert!(Arc::ptr_eq(&first, &tokenizers.entry("0")));
        let digests: Vec<_> = tokenizers.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(digests.len() == TOKENIZERS_MAX && digests.iter().all(|(digest, _)| digest != "1"));
    }
}
