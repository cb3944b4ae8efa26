//! Ranks as processes: a hypercube of connections, `rank` to `rank ^ 2^level`.
//!
//! Sums are exchanged by recursive doubling: after level l a rank holds the sum of the `2^(l+1)` ranks around it. Addition
//! of two f32 commutes, so both partners compute the same bits, those of the fixed tree.

use super::{CommError, MESSAGE_MAX, check_ranks};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// First bytes of a handshake.
const MAGIC: [u8; 8] = *b"unmask/1";
/// Magic, epoch, rank, ranks.
const HELLO_BYTES: usize = 8 + 8 + 4 + 4;
/// Epoch, number of the collective, length of what follows.
const HEADER_BYTES: usize = 8 + 8 + 8;
/// Ends a handshake.
const CONFIRMED: u8 = 1;
/// Between tries to reach a rank that does not listen yet.
const RETRY: Duration = Duration::from_millis(20);
/// Longest handshake of one connection.
const HELLO_LIMIT: Duration = Duration::from_secs(2);
/// Polls of a socket before a rank sleeps in the system.
const SPINS_MAX: u32 = 200;

/// One rank of a group of processes.
pub struct TcpRank {
    rank: usize,
    ranks: usize,
    epoch: u64,
    /// One per level.
    links: Vec<TcpStream>,
    /// Number of the next collective.
    sequence: u64,
    failed: Option<CommError>,
    aborted: Arc<AtomicBool>,
    spins: u32,
    send: Vec<u8>,
    receive: Vec<u8>,
}

impl TcpRank {
    /// Forms a group: every rank listens on its own entry of `addresses` and calls this with the same list. Ranks of
    /// an earlier epoch are turned away, and waited for: they may be about to learn of this one. `stop` gives up.
    ///
    /// # Errors
    /// [`CommError::TimedOut`] when a rank does not come before `deadline`, [`CommError::Epoch`] when others are of a later
    /// epoch, [`CommError::Aborted`] when `stop` is set.
    pub fn form(
        rank: usize,
        epoch: u64,
        listener: &TcpListener,
        addresses: &[SocketAddr],
        deadline: Instant,
        stop: &AtomicBool,
    ) -> Result<TcpRank, CommError> {
        let ranks = addresses.len();
        check_ranks(ranks);
        listener.set_nonblocking(true).map_err(io)?;
        let begun = Instant::now();
        let mut links: Vec<Option<TcpStream>> = (0..ranks.ilog2()).map(|_| None).collect();
        while let Some(level) = links.iter().position(Option::is_none) {
            let partner = rank ^ 1 << level;
            if stop.load(Ordering::Acquire) {
                return Err(CommError::Aborted);
            }
            if Instant::now() >= deadline {
                return Err(CommError::TimedOut { rank: partner, after: begun.elapsed() });
            }
            // The higher rank of a pair connects to the lower; whoever comes first is taken first.
            if partner < rank {
                match connect(rank, ranks, epoch, addresses[partner], deadline)? {
                    Some(link) => links[level] = Some(link),
                    None => std::thread::sleep(RETRY),
                }
            } else if let Some((other, link)) = accept(listener, rank, ranks, epoch)? {
                let level = (other ^ rank).trailing_zeros() as usize;
                links[level] = Some(link);
            } else {
                std::thread::sleep(RETRY / 10);
            }
        }
        let links: Vec<TcpStream> = links.into_iter().flatten().collect();
        for link in &links {
            link.set_nodelay(true).map_err(io)?;
            link.set_read_timeout(None).map_err(io)?;
            link.set_nonblocking(true).map_err(io)?;
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(TcpRank {
            rank,
            ranks,
            epoch,
            links,
            sequence: 0,
            failed: None,
            aborted: Arc::new(AtomicBool::new(false)),
            spins: if ranks <= cores { SPINS_MAX } else { 0 },
            send: Vec::new(),
            receive: Vec::new(),
        })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn ranks(&self) -> usize {
        self.ranks
    }

    pub(super) fn all_reduce(&mut self, values: &mut [f32], deadline: Instant) -> Result<(), CommError> {
        // A pass that scores no row has nothing to add up in its last layer, on any rank.
        if values.is_empty() {
            return Ok(());
        }
        self.collective(|this| {
            for level in 0..this.links.len() {
                this.begin(4 * values.len());
                values.iter().for_each(|x| this.send.extend_from_slice(&x.to_le_bytes()));
                this.exchange(level, Some(4 * values.len()), deadline)?;
                for (value, theirs) in values.iter_mut().zip(this.receive[HEADER_BYTES..].chunks_exact(4)) {
                    *value += f32::from_le_bytes([theirs[0], theirs[1], theirs[2], theirs[3]]);
                }
            }
            Ok(())
        })
    }

    pub(super) fn all_gather(&mut self, mine: &[u8], all: &mut [u8], deadline: Instant) -> Result<(), CommError> {
        if mine.is_empty() {
            return Ok(());
        }
        self.collective(|this| {
            let size = mine.len();
            all[this.rank * size..][..size].copy_from_slice(mine);
            for level in 0..this.links.len() {
                // The aligned run of ranks whose parts are here already, and that of the partner.
                let (run, bytes) = (this.rank >> level, size << level);
                this.begin(bytes);
                this.send.extend_from_slice(&all[run * bytes..][..bytes]);
                this.exchange(level, Some(bytes), deadline)?;
                all[(run ^ 1) * bytes..][..bytes].copy_from_slice(&this.receive[HEADER_BYTES..]);
            }
            Ok(())
        })
    }

    pub(super) fn broadcast(&mut self, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), CommError> {
        self.collective(|this| {
            // A rank hears it at the level of its lowest set bit, and passes it on at those below.
            let heard = if this.rank == 0 { this.links.len() } else { this.rank.trailing_zeros() as usize };
            if this.rank > 0 {
                this.send.clear();
                this.exchange(heard, None, deadline)?;
                bytes.clear();
                bytes.extend_from_slice(&this.receive[HEADER_BYTES..]);
            }
            for level in (0..heard).rev() {
                this.begin(bytes.len());
                this.send.extend_from_slice(bytes);
                this.exchange(level, Some(0), deadline)?;
            }
            Ok(())
        })
    }

    pub(super) fn abort_handle(&self) -> Abort {
        let links = self.links.iter().filter_map(|link| link.try_clone().ok()).collect();
        Abort { aborted: Arc::clone(&self.aborted), links }
    }

    /// One collective: the first error ends this rank's connections, so that no other waits for it.
    fn collective(&mut self, run: impl FnOnce(&mut Self) -> Result<(), CommError>) -> Result<(), CommError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let result =
            run(self).map_err(|error| if self.aborted.load(Ordering::Acquire) { CommError::Aborted } else { error });
        self.sequence += 1;
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.links.iter().for_each(|link| _ = link.shutdown(Shutdown::Both));
        }
        result
    }

    /// Starts a message of `len` bytes in the send buffer.
    fn begin(&mut self, len: usize) {
        self.send.clear();
        self.send.extend_from_slice(&self.epoch.to_le_bytes());
        self.send.extend_from_slice(&self.sequence.to_le_bytes());
        self.send.extend_from_slice(&(len as u64).to_le_bytes());
    }

    /// Sends the send buffer to the partner of a level and receives a message of `expected` bytes from it (`None`: of
    /// any length; `Some(0)`: none at all), both at once.
    fn exchange(&mut self, level: usize, expected: Option<usize>, deadline: Instant) -> Result<(), CommError> {
        let (begun, partner) = (Instant::now(), self.rank ^ 1 << level);
        let lost = CommError::PeerLost { rank: partner };
        let (mut sent, mut received, mut idle) = (0, 0, 0);
        let mut wanted = if expected == Some(0) { 0 } else { HEADER_BYTES };
        self.receive.resize(wanted, 0);
        loop {
            let mut moved = false;
            if sent < self.send.len() {
                match self.links[level].write(&self.send[sent..]) {
                    Ok(0) => return Err(lost),
                    Ok(count) => (sent, moved) = (sent + count, true),
                    Err(error) if would_wait(&error) => {}
                    Err(_) => return Err(lost),
                }
            }
            if received < wanted {
                match self.links[level].read(&mut self.receive[received..wanted]) {
                    Ok(0) => return Err(lost),
                    Ok(count) => (received, moved) = (received + count, true),
                    Err(error) if would_wait(&error) => {}
                    Err(_) => return Err(lost),
                }
                if received == HEADER_BYTES && wanted == HEADER_BYTES {
                    wanted += self.check_header(partner, expected)?;
                    self.receive.resize(wanted, 0);
                }
            }
            if sent == self.send.len() && received == wanted {
                return Ok(());
            }
            idle = if moved { 0 } else { idle + 1 };
            if idle > self.spins {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(CommError::TimedOut { rank: partner, after: begun.elapsed() });
                }
                wait(&self.links[level], received < wanted, sent < self.send.len(), left);
            }
        }
    }

    /// The length that a header promises.
    fn check_header(&self, rank: usize, expected: Option<usize>) -> Result<usize, CommError> {
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.receive[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (epoch, sequence, len) = (number(0), number(8), number(16) as usize);
        if epoch != self.epoch {
            return Err(CommError::Epoch { mine: self.epoch, theirs: epoch });
        }
        if sequence != self.sequence {
            return Err(CommError::Malformed { rank, what: "a message of another collective" });
        }
        if len > MESSAGE_MAX || expected.is_some_and(|expected| expected != len) {
            return Err(CommError::Malformed { rank, what: "a message of another length" });
        }
        Ok(len)
    }
}

impl Drop for TcpRank {
    fn drop(&mut self) {
        self.links.iter().for_each(|link| _ = link.shutdown(Shutdown::Both));
    }
}

/// Sleeps until a socket is ready, or for `limit`.
fn wait(link: &TcpStream, read: bool, write: bool, limit: Duration) {
    let events = if read { libc::POLLIN } else { 0 } | if write { libc::POLLOUT } else { 0 };
    let mut entry = libc::pollfd { fd: link.as_raw_fd(), events, revents: 0 };
    let limit = limit.as_millis().clamp(1, 1000) as libc::c_int;
    // SAFETY: one entry is passed, and it outlives the call.
    unsafe { libc::poll(&mut entry, 1, limit) };
}

fn would_wait(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn io(error: std::io::Error) -> CommError {
    CommError::Io(error.to_string())
}

fn hello(rank: usize, ranks: usize, epoch: u64) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    bytes[16..20].copy_from_slice(&(rank as u32).to_le_bytes());
    bytes[20..].copy_from_slice(&(ranks as u32).to_le_bytes());
    bytes
}

/// Epoch, rank and ranks of a greeting.
fn read_hello(link: &mut TcpStream) -> Option<(u64, usize, usize)> {
    let mut bytes = [0; HELLO_BYTES];
    link.read_exact(&mut bytes).ok()?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let epoch = u64::from(word(8)) | u64::from(word(12)) << 32;
    (bytes[..8] == MAGIC).then_some((epoch, word(16) as usize, word(20) as usize))
}

/// A greeted connection to a lower rank; `None` while it does not listen.
fn connect(
    rank: usize,
    ranks: usize,
    epoch: u64,
    address: SocketAddr,
    deadline: Instant,
) -> Result<Option<TcpStream>, CommError> {
    let left = deadline.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), HELLO_LIMIT);
    let Ok(mut link) = TcpStream::connect_timeout(&address, left) else { return Ok(None) };
    link.set_read_timeout(Some(left)).map_err(io)?;
    if link.write_all(&hello(rank, ranks, epoch)).is_err() {
        return Ok(None);
    }
    match read_hello(&mut link) {
        Some((theirs, ..)) if theirs > epoch => Err(CommError::Epoch { mine: epoch, theirs }),
        // Said so that a connection that waited too long to be accepted is not taken for one.
        Some((other, _, theirs)) if other == epoch && theirs == ranks => {
            Ok(link.write_all(&[CONFIRMED]).is_ok().then_some(link))
        }
        _ => Ok(None),
    }
}

/// A greeted connection from a higher rank; `None` when nobody, or nobody of this group, is there.
fn accept(
    listener: &TcpListener,
    rank: usize,
    ranks: usize,
    epoch: u64,
) -> Result<Option<(usize, TcpStream)>, CommError> {
    let mut link = match listener.accept() {
        Ok((link, _)) => link,
        Err(error) if would_wait(&error) => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    link.set_nonblocking(false).map_err(io)?;
    link.set_read_timeout(Some(HELLO_LIMIT)).map_err(io)?;
    let greeting = read_hello(&mut link);
    // A stranger is answered too: one of another epoch learns it from the answer.
    let answered = link.write_all(&hello(rank, ranks, epoch)).is_ok();
    let mut confirmed = [0];
    if let Some((theirs, ..)) = greeting.filter(|&(theirs, ..)| theirs > epoch) {
        return Err(CommError::Epoch { mine: epoch, theirs });
    }
    let partner = |other: usize| other > rank && other < ranks && (other ^ rank).is_power_of_two();
    Ok(greeting
        .filter(|&(theirs, other, count)| answered && theirs == epoch && count == ranks && partner(other))
        .filter(|_| link.read_exact(&mut confirmed).is_ok() && confirmed == [CONFIRMED])
        .map(|(_, other, _)| (other, link)))
}

/// Ends this rank's part of a group.
pub struct Abort {
    aborted: Arc<AtomicBool>,
    links: Vec<TcpStream>,
}

impl Abort {
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.links.iter().for_each(|link| _ = link.shutdown(Shutdown::Both));
    }
}
