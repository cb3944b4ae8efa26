//! A network in memory: pipes of bytes that arrive after a latency, and its faults.
//!
//! What is drawn depends on the seed, the connection and the tick alone, so that the order in which a host's tasks run
//! changes nothing for others.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use unmask_proto::network::{Connection, Dial, Dialling, Incoming};

/// Where every host listens.
const PORT: u16 = 7700;
/// Bytes under way or unread before a writer waits.
const PIPE_BYTES_MAX: usize = 256 << 10;
/// A connection that is cut for this long is reset (ticks).
const RESET_AFTER: u64 = 1600;

pub type HostId = usize;

/// The address of a host.
pub fn address(host: HostId) -> String {
    format!("10.0.0.{}:{PORT}", host + 1)
}

/// The host at an address.
pub fn host_of(address: &str) -> Option<HostId> {
    let host = address.strip_suffix(&format!(":{PORT}"))?.rsplit('.').next()?;
    host.parse::<usize>().ok()?.checked_sub(1)
}

/// Direction of a connection: dialled by one host, accepted by another.
type PipeId = (HostId, u64, bool);

#[derive(Default)]
struct Pipe {
    from: HostId,
    to: HostId,
    /// With the tick from which it may arrive; `None` is the end.
    under_way: VecDeque<(u64, Option<Vec<u8>>)>,
    arrived: VecDeque<u8>,
    bytes: usize,
    ended: bool,
    reset: bool,
    reader_gone: bool,
    writer_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

struct Dialled {
    conn: (HostId, u64),
    to: HostId,
    due: u64,
    answer: oneshot::Sender<io::Result<Connection>>,
}

#[derive(Default)]
struct State {
    seed: u64,
    now: u64,
    /// Most ticks that bytes take where nothing is slow.
    latency_max: u64,
    pipes: BTreeMap<PipeId, Pipe>,
    dials: Vec<Dialled>,
    dialled: BTreeMap<HostId, u64>,
    listeners: BTreeMap<HostId, mpsc::UnboundedSender<io::Result<Connection>>>,
    /// From one host to another, since when.
    cuts: BTreeMap<(HostId, HostId), u64>,
    /// More ticks on the way from one host to another.
    slow: BTreeMap<(HostId, HostId), u64>,
    /// Hosts that vanished without a word.
    silent: BTreeSet<HostId>,
}

impl State {
    fn latency(&self, conn: (HostId, u64), from: HostId, to: HostId) -> u64 {
        let mix = self.seed ^ (conn.0 as u64) << 48 ^ conn.1 << 32 ^ (from as u64) << 24 ^ self.now;
        let drawn = StdRng::seed_from_u64(mix).random_range(1..=self.latency_max);
        drawn + self.slow.get(&(from, to)).copied().unwrap_or(0)
    }

    fn passes(&self, from: HostId, to: HostId) -> bool {
        !self.cuts.contains_key(&(from, to)) && !self.silent.contains(&from) && !self.silent.contains(&to)
    }

    fn push(&mut self, id: PipeId, packet: Option<Vec<u8>>) {
        let Some((from, to)) = self.pipes.get(&id).map(|pipe| (pipe.from, pipe.to)) else { return };
        let due = self.now + self.latency((id.0, id.1), from, to);
        if let Some(pipe) = self.pipes.get_mut(&id) {
            // TCP keeps order.
            let due = pipe.under_way.back().map_or(due, |last| last.0.max(due));
            pipe.under_way.push_back((due, packet));
        }
    }

    fn reset(&mut self, wanted: impl Fn(HostId, HostId) -> bool) {
        for pipe in self.pipes.values_mut().filter(|pipe| wanted(pipe.from, pipe.to)) {
            pipe.reset = true;
            pipe.reader.take().into_iter().chain(pipe.writer.take()).for_each(Waker::wake);
        }
    }
}

/// The network. Clones share it.
#[derive(Clone)]
pub struct Network(Arc<Mutex<State>>);

impl Network {
    pub fn new(seed: u64, latency_max: u64) -> Self {
        Self(Arc::new(Mutex::new(State { seed, latency_max, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The way of a host to the others.
    pub fn of(&self, host: HostId) -> unmask_proto::network::Network {
        unmask_proto::network::Network::new(Dialler { network: self.clone(), host })
    }

    /// A host listens from now on; what it had open before is reset.
    pub fn up(&self, host: HostId) -> Incoming {
        let (listener, accepted) = mpsc::unbounded_channel();
        let mut state = self.state();
        state.reset(|from, to| from == host || to == host);
        state.silent.remove(&host);
        state.listeners.insert(host, listener);
        let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, host as u8 + 1), PORT));
        Incoming::new(address, UnboundedReceiverStream::new(accepted))
    }

    /// Nobody listens there any more. A silent host does not even say so.
    pub fn down(&self, host: HostId, silent: bool) {
        let mut state = self.state();
        state.listeners.remove(&host);
        if silent {
            state.silent.insert(host);
        }
    }

    /// Bytes from one host to another wait.
    pub fn cut(&self, from: HostId, to: HostId) {
        let mut state = self.state();
        let now = state.now;
        state.cuts.entry((from, to)).or_insert(now);
    }

    pub fn heal(&self, from: HostId, to: HostId) {
        self.state().cuts.remove(&(from, to));
    }

    /// Ticks on top of the usual latency.
    pub fn slow(&self, from: HostId, to: HostId, ticks: u64) {
        self.state().slow.insert((from, to), ticks);
    }

    /// Breaks what is open between two hosts.
    pub fn reset(&self, one: HostId, other: HostId) {
        self.state().reset(|from, to| (from, to) == (one, other) || (from, to) == (other, one));
    }

    /// Breaks all that is open to and from a host.
    pub fn reset_all(&self, host: HostId) {
        self.state().reset(|from, to| from == host || to == host);
    }

    /// Time goes on: what is due arrives.
    pub fn tick(&self, now: u64) {
        let mut state = self.state();
        state.now = now;
        let untaken = accept(&mut state, &self.0);
        let overdue: Vec<_> =
            state.cuts.iter().filter(|(_, since)| now - **since == RESET_AFTER).map(|c| *c.0).collect();
        for (one, other) in overdue {
            state.reset(|from, to| (from, to) == (one, other) || (from, to) == (other, one));
        }
        let ids: Vec<PipeId> = state.pipes.keys().copied().collect();
        for id in ids {
            let (from, to) = (state.pipes[&id].from, state.pipes[&id].to);
            let passes = state.passes(from, to);
            let Some(pipe) = state.pipes.get_mut(&id) else { continue };
            while passes && pipe.under_way.front().is_some_and(|(due, _)| *due <= now) {
                match pipe.under_way.pop_front() {
                    Some((_, Some(bytes))) => pipe.arrived.extend(bytes),
                    _ => pipe.ended = true,
                }
                pipe.reader.take().into_iter().for_each(Waker::wake);
            }
            if pipe.bytes < PIPE_BYTES_MAX {
                pipe.writer.take().into_iter().for_each(Waker::wake);
            }
            if pipe.reader_gone && pipe.writer_gone {
                state.pipes.remove(&id);
            }
        }
        drop(state);
        drop(untaken);
    }
}

/// Lets connections in that are due; returns ends that nobody took, to be dropped when the lock is free again.
fn accept(state: &mut State, shared: &Arc<Mutex<State>>) -> Vec<Connection> {
    let mut untaken = Vec::new();
    for dialled in std::mem::take(&mut state.dials) {
        let Dialled { conn, to, due, answer } = dialled;
        if answer.is_closed() {
            continue;
        }
        if due > state.now || !state.passes(conn.0, to) || !state.passes(to, conn.0) {
            state.dials.push(Dialled { conn, to, due, answer });
            continue;
        }
        let Some(listener) = state.listeners.get(&to).cloned() else {
            let _ = answer.send(Err(io::ErrorKind::ConnectionRefused.into()));
            continue;
        };
        let (there, back) = ((conn.0, conn.1, true), (conn.0, conn.1, false));
        state.pipes.insert(there, Pipe { from: conn.0, to, ..Pipe::default() });
        state.pipes.insert(back, Pipe { from: to, to: conn.0, ..Pipe::default() });
        let end = |read, write| Connection::new(End { state: Arc::clone(shared), read, write });
        let (dialler, acceptor) = (end(back, there), end(there, back));
        untaken.extend(answer.send(Ok(dialler)).err().and_then(Result::ok));
        untaken.extend(listener.send(Ok(acceptor)).err().and_then(|unsent| unsent.0.ok()));
    }
    untaken
}

struct Dialler {
    network: Network,
    host: HostId,
}

impl Dial for Dialler {
    fn dial(&self, address: String) -> Dialling {
        let (answer, answered) = oneshot::channel();
        if let Some(to) = host_of(&address) {
            let mut state = self.network.state();
            let number = state.dialled.entry(self.host).or_default();
            *number += 1;
            let conn = (self.host, *number);
            let due = state.now + state.latency(conn, self.host, to) + state.latency(conn, to, self.host);
            state.dials.push(Dialled { conn, to, due, answer });
        }
        Box::pin(async move { answered.await.unwrap_or(Err(io::ErrorKind::HostUnreachable.into())) })
    }
}

/// One host's end of a connection.
struct End {
    state: Arc<Mutex<State>>,
    read: PipeId,
    write: PipeId,
}

impl End {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        let Some(pipe) = state.pipes.get_mut(&self.read) else { return Poll::Ready(Ok(())) };
        if pipe.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let taken = pipe.arrived.len().min(into.remaining());
        if taken == 0 && !pipe.ended {
            pipe.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let (head, tail) = pipe.arrived.as_slices();
        let from_head = taken.min(head.len());
        into.put_slice(&head[..from_head]);
        into.put_slice(&tail[..taken - from_head]);
        pipe.arrived.drain(..taken);
        pipe.bytes -= taken;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.state();
        let Some(pipe) = state.pipes.get_mut(&self.write) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if pipe.reset || pipe.reader_gone {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let taken = bytes.len().min(PIPE_BYTES_MAX.saturating_sub(pipe.bytes));
        if taken == 0 {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        pipe.bytes += taken;
        state.push(self.write, Some(bytes[..taken].to_vec()));
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state().push(self.write, None);
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.state();
        state.push(self.write, None);
        if let Some(pipe) = state.pipes.get_mut(&self.write) {
            pipe.writer_gone = true;
        }
        if let Some(pipe) = state.pipes.get_mut(&self.read) {
            pipe.reader_gone = true;
            pipe.writer.take().into_iter().for_each(Waker::wake);
        }
    }
}
