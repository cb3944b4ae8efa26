//! What goes wrong, and how it is put right.

use crate::network::HostId;
use crate::trace;
use crate::world::World;

/// The rate of a slow clock: a lease seems to last three times as long.
const SLOW: f64 = 0.3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process dies and is started again later. A silent death is the machine's: nobody is told.
    Kill { host: HostId, silent: bool, ticks: u64 },
    /// The process does not run for a while (SIGSTOP), and does not know.
    Pause { host: HostId, ticks: u64 },
    /// Bytes from one to the other wait, or both ways.
    Cut { one: HostId, other: HostId, both: bool, ticks: u64 },
    /// Open connections break.
    Reset { one: HostId, other: HostId },
    /// Bytes take `by` ticks more.
    Slow { one: HostId, other: HostId, by: u64, ticks: u64 },
    /// A controller does not reach the store.
    StoreAway { host: HostId, ticks: u64 },
    /// The leader does not reach the store, and its clock is slow: it takes itself for the leader when another one is.
    Depose { ticks: u64 },
    /// All open connections of a host break.
    ResetAll { host: HostId },
    /// The store does what it is asked, and the answer is lost.
    LoseAnswers { percent: u32, ticks: u64 },
    /// A clock goes at another rate.
    Drift { host: HostId, percent: u32, ticks: u64 },
}

impl Fault {
    pub fn touches(&self, spared: HostId) -> bool {
        match *self {
            Fault::Kill { host, .. }
            | Fault::Pause { host, .. }
            | Fault::StoreAway { host, .. }
            | Fault::Drift { host, .. } => host == spared,
            Fault::Cut { one, other, .. } | Fault::Reset { one, other } | Fault::Slow { one, other, .. } => {
                one == spared || other == spared
            }
            Fault::LoseAnswers { .. } => false,
            Fault::Depose { .. } | Fault::ResetAll { .. } => true,
        }
    }

    fn lasts(&self) -> u64 {
        match *self {
            Fault::Kill { ticks, .. }
            | Fault::Pause { ticks, .. }
            | Fault::Cut { ticks, .. }
            | Fault::Slow { ticks, .. }
            | Fault::StoreAway { ticks, .. }
            | Fault::Depose { ticks }
            | Fault::LoseAnswers { ticks, .. }
            | Fault::Drift { ticks, .. } => ticks,
            Fault::Reset { .. } | Fault::ResetAll { .. } => 0,
        }
    }
}

/// Faults to come, and those to put right.
pub struct Faults {
    coming: Vec<(u64, Fault)>,
    lasting: Vec<(u64, Fault)>,
}

impl Faults {
    /// In order of time.
    pub fn new(mut coming: Vec<(u64, Fault)>) -> Self {
        coming.reverse();
        Self { coming, lasting: Vec::new() }
    }

    /// What begins or ends now.
    pub fn tick(&mut self, world: &mut World) {
        trace::on("world");
        let over: Vec<_> = self.lasting.extract_if(.., |(until, _)| *until <= world.now).collect();
        for (_, fault) in over {
            // Where two of a kind overlap, the first to end ends both.
            trace::add("put right", vec![("fault", format!("{fault:?}"))]);
            put_right(fault, world);
        }
        while self.coming.last().is_some_and(|(at, _)| *at <= world.now) {
            let Some((at, fault)) = self.coming.pop() else { break };
            trace::on("world");
            trace::add("fault", vec![("fault", format!("{fault:?}"))]);
            begin(fault, world);
            self.lasting.push((at + fault.lasts(), fault));
        }
    }
}

fn begin(fault: Fault, world: &mut World) {
    match fault {
        Fault::Kill { host, silent, ticks } => {
            if world.hosts[host].is_up() {
                world.network.down(host, silent);
                world.hosts[host].kill();
                world.restarts.push((world.now + ticks, host));
            }
        }
        Fault::Pause { host, .. } => world.hosts[host].paused = true,
        Fault::Cut { one, other, both, .. } => {
            world.network.cut(one, other);
            if both {
                world.network.cut(other, one);
            }
        }
        Fault::Reset { one, other } => world.network.reset(one, other),
        Fault::Slow { one, other, by, .. } => {
            world.network.slow(one, other, by);
            world.network.slow(other, one, by);
        }
        Fault::StoreAway { host, .. } => world.store.reach(host, false),
        Fault::Depose { .. } => {
            if let Some(leader) = world.store.leader() {
                world.store.reach(leader, false);
                world.hosts[leader].rate = SLOW;
            }
        }
        Fault::ResetAll { host } => world.network.reset_all(host),
        Fault::LoseAnswers { percent, .. } => world.store.lose_answers(percent),
        Fault::Drift { host, percent, .. } => world.hosts[host].rate = f64::from(percent) / 100.0,
    }
}

fn put_right(fault: Fault, world: &mut World) {
    match fault {
        Fault::Kill { .. } | Fault::Reset { .. } | Fault::ResetAll { .. } => {}
        Fault::Depose { .. } => {
            world.store.reach_all();
            world.hosts.iter_mut().for_each(|host| host.rate = 1.0);
        }
        Fault::Pause { host, .. } => world.hosts[host].paused = false,
        Fault::Cut { one, other, .. } => {
            world.network.heal(one, other);
            world.network.heal(other, one);
        }
        Fault::Slow { one, other, .. } => {
            world.network.slow(one, other, 0);
            world.network.slow(other, one, 0);
        }
        Fault::StoreAway { host, .. } => world.store.reach(host, true),
        Fault::LoseAnswers { .. } => world.store.lose_answers(0),
        Fault::Drift { host, .. } => world.hosts[host].rate = 1.0,
    }
}
