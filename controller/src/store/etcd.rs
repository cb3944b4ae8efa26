//! etcd as the store. The client reconnects by itself; what it does not do is here: limits on time, another try on
//! another member, and noticing a watch that has fallen silent.

use super::{
    Change, Changes, Entry, Expected, LEASE_TTL, LeaseId, Listing, Put, Revision, Store, StoreError, StoreTls,
};
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, EventType, GetOptions, Identity,
    KeyValue, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchResponse,
};
use futures::stream::StreamExt as _;
use std::fmt;
use std::future::Future;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;

/// Keys of other programs in the same cluster, and of other layouts, are left alone.
const ROOT: &str = "unmask/v1/";
/// Longest wait for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Pause before what may be done twice is tried again; another try may reach another member.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// How often members are pinged, and how long an answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(2));
/// How often a watch is asked how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// A watch that says nothing for so long is given up.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Batches of changes that may wait for their reader; then the watch waits.
const BATCHES_MAX: usize = 64;

/// An etcd cluster.
#[derive(Clone)]
pub struct Etcd {
    client: Box<Client>,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Etcd")
    }
}

impl Etcd {
    /// Connects to `etcd://HOST:PORT,..`, under TLS where certificates are given.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when no member answers.
    pub async fn open(url: &str, tls: Option<&StoreTls>) -> Result<Self, StoreError> {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let members: Vec<String> = url
            .trim_start_matches("etcd://")
            .split(',')
            .filter(|member| !member.is_empty())
            .map(|member| format!("{scheme}://{member}"))
            .collect();
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_LIMIT)
            .with_keep_alive(PING.0, PING.1)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let options = match tls {
            Some(tls) => options.with_tls(tls_options(tls)),
            None => options,
        };
        let client = Client::connect(members, Some(options)).await.map_err(|error| failed(&error))?;
        let store = Self { client: Box::new(client) };
        store.get("").await?;
        Ok(store)
    }

    /// Tries an operation that may be done twice, on whichever members, for as long as one answer may take.
    async fn again<T, F: Future<Output = Result<T, Error>>>(
        &self,
        mut operation: impl FnMut(Client) -> F,
    ) -> Result<T, StoreError> {
        let began = Instant::now();
        loop {
            match limited(operation(Client::clone(&self.client))).await {
                // A member that is down refuses at once.
                Err(StoreError::Unavailable(_)) if began.elapsed() < ANSWER_LIMIT => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                done => return done,
            }
        }
    }
}

fn tls_options(tls: &StoreTls) -> TlsOptions {
    let options = match &tls.ca {
        Some(ca) => TlsOptions::new().ca_certificate(Certificate::from_pem(ca)),
        None => TlsOptions::new().with_native_roots(),
    };
    match &tls.identity {
        Some((cert, key)) => options.identity(Identity::from_pem(cert, key)),
        None => options,
    }
}

async fn limited<T>(operation: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
    match timeout(ANSWER_LIMIT, operation).await {
        Ok(done) => done.map_err(|error| failed(&error)),
        Err(_) => Err(StoreError::Unavailable(format!("no answer within {} s", ANSWER_LIMIT.as_secs()))),
    }
}

fn failed(error: &Error) -> StoreError {
    match error {
        Error::GRpcStatus(status) if status.code() == tonic::Code::NotFound => StoreError::LeaseGone,
        Error::LeaseKeepAliveError(_) => StoreError::LeaseGone,
        error => StoreError::Unavailable(error.to_string()),
    }
}

fn rooted(key: &str) -> String {
    format!("{ROOT}{key}")
}

fn entry(kv: &KeyValue) -> Entry {
    let revision = |number: i64| Revision(number.unsigned_abs());
    Entry { revision: revision(kv.mod_revision()), created: revision(kv.create_revision()), value: kv.value().to_vec() }
}

/// A key without the root. Keys that are not UTF-8 are not ours.
fn name(kv: &KeyValue) -> Option<String> {
    Some(kv.key_str().ok()?.strip_prefix(ROOT)?.to_owned())
}

impl Store for Etcd {
    fn exclusive(&self) -> bool {
        false
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = rooted(key);
        let key = &key;
        let response = self.again(|mut client| async move { client.get(key.as_str(), None).await }).await?;
        Ok(response.kvs().first().map(entry))
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        let key = rooted(prefix);
        let key = &key;
        let get =
            |mut client: Client| async move { client.get(key.as_str(), Some(GetOptions::new().with_prefix())).await };
        let response = self.again(get).await?;
        let revision = Revision(response.header().map_or(0, |header| header.revision().unsigned_abs()));
        let entries = response.kvs().iter().filter_map(|kv| Some((name(kv)?, entry(kv)))).collect();
        Ok(Listing { revision, entries })
    }

    async fn put(&self, put: Put) -> Result<Revision, StoreError> {
        put.check_sizes()?;
        let key = rooted(&put.key);
        let expected = match put.expected {
            Expected::Absent => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
            Expected::Revision(revision) => Compare::mod_revision(key.as_str(), CompareOp::Equal, revision.0 as i64),
        };
        let mut compares = vec![expected];
        let mut reads = vec![TxnOp::get(key.as_str(), None)];
        if let Some(guard) = &put.guard {
            let (key, created) = (rooted(&guard.key), guard.created.0 as i64);
            compares.push(Compare::create_revision(key.as_str(), CompareOp::Equal, created));
            reads.push(TxnOp::get(key.as_str(), None));
        }
        let write = match put.value {
            Some(value) => {
                let options = put.lease.map(|lease| PutOptions::new().with_lease(lease.0 as i64));
                TxnOp::put(key.as_str(), value, options)
            }
            None => TxnOp::delete(key.as_str(), None::<DeleteOptions>),
        };
        let txn = Txn::new().when(compares).and_then([write]).or_else(reads);
        // Not tried again: it may have been done, and only the caller knows what that means.
        let response = limited(Client::clone(&self.client).txn(txn)).await?;
        if response.succeeded() {
            return Ok(Revision(response.header().map_or(0, |header| header.revision().unsigned_abs())));
        }
        let mut found = response.op_responses().into_iter().map(|response| match response {
            TxnOpResponse::Get(got) => got.kvs().first().map(entry),
            _ => None,
        });
        let there = found.next().flatten();
        match (&put.guard, found.next().flatten()) {
            (Some(guard), held) if held.as_ref().is_none_or(|entry| entry.created != guard.created) => {
                Err(StoreError::Deposed(guard.key.clone()))
            }
            _ => {
                let found = there.map(|entry| entry.revision);
                Err(StoreError::Conflict { key: put.key, expected: put.expected, found })
            }
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = ttl.clamp(*LEASE_TTL.start(), *LEASE_TTL.end()).as_secs() as i64;
        let response = self.again(|mut client| async move { client.lease_grant(seconds, None).await }).await?;
        Ok(LeaseId(response.id().unsigned_abs()))
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), StoreError> {
        let id = lease.0 as i64;
        self.again(|mut client| async move { client.lease_keep_alive(id).await.map(drop) }).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let id = lease.0 as i64;
        match self.again(|mut client| async move { client.lease_revoke(id).await.map(drop) }).await {
            Err(StoreError::LeaseGone) => Ok(()),
            done => done,
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> Changes {
        let (batches, reading) = mpsc::channel(BATCHES_MAX);
        let (client, prefix) = (Client::clone(&self.client), rooted(prefix));
        tokio::spawn(async move {
            tokio::select! {
                ended = follow(client, &prefix, from, &batches) => {
                    // Fails when nobody reads any more.
                    let _ = batches.send(Err(ended)).await;
                }
                () = batches.closed() => {}
            }
        });
        ReceiverStream::new(reading).boxed()
    }
}

/// Sends changes until something ends the watch; says what.
async fn follow(
    mut client: Client,
    prefix: &str,
    from: Revision,
    batches: &mpsc::Sender<Result<Vec<Change>, StoreError>>,
) -> StoreError {
    let options = WatchOptions::new().with_prefix().with_start_revision(from.0 as i64).with_progress_notify();
    let mut watch = match limited(client.watch(prefix, Some(options))).await {
        Ok(watch) => watch,
        Err(error) => return error,
    };
    let mut asks = interval(PROGRESS_INTERVAL);
    asks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        let response = tokio::select! {
            response = watch.message() => response,
            _ = asks.tick() => {
                if heard.elapsed() > SILENCE_LIMIT {
                    return StoreError::Unavailable(format!("the watch is silent for {} s", SILENCE_LIMIT.as_secs()));
                }
                if let Err(error) = limited(watch.request_progress()).await {
                    return error;
                }
                continue;
            }
        };
        heard = Instant::now();
        let response = match response {
            Ok(Some(response)) => response,
            Ok(None) => return StoreError::Unavailable("the watch ended".into()),
            Err(error) => return failed(&error),
        };
        if response.compact_revision() > 0 {
            return StoreError::Compacted(Revision(response.compact_revision().unsigned_abs() - 1));
        }
        if response.canceled() {
            return StoreError::Unavailable(format!("the watch was cancelled: {}", response.cancel_reason()));
        }
        let changes = changes(&response);
        if !changes.is_empty() && batches.send(Ok(changes)).await.is_err() {
            return StoreError::Unavailable("nobody reads the watch".into());
        }
    }
}

fn changes(response: &WatchResponse) -> Vec<Change> {
    let read = |event: &etcd_client::Event| {
        let kv = event.kv()?;
        let there = event.event_type() == EventType::Put;
        let revision = Revision(kv.mod_revision().unsigned_abs());
        Some(Change { key: name(kv)?, revision, entry: there.then(|| entry(kv)) })
    };
    response.events().iter().filter_map(read).collect()
}
