//! Everything a seed decides: how large the cluster is, who asks for what, and what goes wrong when.

use crate::client::Wish;
use crate::faults::Fault;
use crate::host::ticks;
use crate::network::HostId;
use crate::operator::Order;
use crate::world::{Role, loaded};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::ops::Range;
use std::time::Duration;

/// A process that ends is started again after this.
pub const SUPERVISOR: Duration = Duration::from_millis(700);
/// The first requests come when the cluster has had this to form.
const FORMED: Duration = Duration::from_secs(2);
/// Nothing goes wrong from here on.
const CALM: Duration = Duration::from_secs(16);
/// Leases, times-to-live, pauses between tries and circuits take up to this to be well again.
const SETTLED: Duration = Duration::from_secs(28);
/// Requests that must succeed come until then.
const LAST: Duration = Duration::from_secs(31);
/// By then everything has ended.
pub const END: Duration = Duration::from_secs(72);
/// A deposed leader goes on for so long: its lease ends after 5 s, its own count of it after 16 s.
const DEPOSED: Duration = Duration::from_secs(11);
const MS: Duration = Duration::from_millis(1);

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing, but some requests are bad.
    Calm,
    /// Controllers die and come back; everybody else goes on.
    Leaders,
    /// Everything but one worker, the controllers' word to it, and its way to the gateways.
    Spared,
    /// Everything.
    Everything,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub kind: Kind,
    /// Controllers, workers, gateways.
    pub counts: [usize; 3],
    pub latency_max: u64,
    pub pages: u64,
    pub active_max: usize,
    pub step_base: Duration,
    pub step_row: Duration,
    pub drain_ms: u64,
    pub wishes: Vec<Wish>,
    pub orders: Vec<(Duration, Order)>,
    /// By tick.
    pub faults: Vec<(u64, Fault)>,
}

impl Plan {
    pub fn draw(seed: u64) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        let kind = match dice.random_range(0..20) {
            0 => Kind::Calm,
            1..=4 => Kind::Leaders,
            5..=11 => Kind::Spared,
            _ => Kind::Everything,
        };
        let mut plan = Self {
            seed,
            kind,
            counts: [dice.random_range(2..=3), dice.random_range(2..=3), dice.random_range(1..=2)],
            latency_max: dice.random_range(1..=4),
            pages: dice.random_range(6..24),
            active_max: dice.random_range(2..8),
            step_base: MS * dice.random_range(5..40),
            step_row: Duration::from_micros(dice.random_range(0..400)),
            drain_ms: dice.random_range(200..3000),
            wishes: Vec::new(),
            orders: Vec::new(),
            faults: Vec::new(),
        };
        plan.draw_wishes(&mut dice);
        plan.draw_orders(&mut dice);
        if kind != Kind::Calm {
            for _ in 0..dice.random_range(1..14) {
                let at = dice.random_range(ticks(FORMED) / 2..ticks(CALM));
                plan.faults.extend(plan.draw_fault(&mut dice, ticks(CALM) - at).map(|fault| (at, fault)));
            }
            if kind == Kind::Everything && dice.random_bool(0.25) {
                plan.depose(&mut dice);
            }
            plan.faults.sort_by_key(|(at, _)| *at);
        }
        plan
    }

    pub fn hosts(&self) -> usize {
        self.counts.iter().sum::<usize>() + 1
    }

    /// The hosts of a role.
    pub fn of(&self, role: Role) -> Range<HostId> {
        let [controllers, workers, gateways] = self.counts;
        match role {
            Role::Controller => 0..controllers,
            Role::Worker => controllers..controllers + workers,
            Role::Gateway => controllers + workers..controllers + workers + gateways,
            Role::Client => self.hosts() - 1..self.hosts(),
        }
    }

    pub fn role(&self, host: HostId) -> Role {
        let roles = [Role::Controller, Role::Worker, Role::Gateway];
        roles.into_iter().find(|role| self.of(*role).contains(&host)).unwrap_or(Role::Client)
    }

    /// The worker that nothing happens to.
    pub fn spared(&self) -> Option<HostId> {
        (self.kind == Kind::Spared).then(|| self.of(Role::Worker).start)
    }

    fn draw_wishes(&mut self, dice: &mut StdRng) {
        let busy = dice.random_range(6..24);
        for number in 0..busy {
            let at = MS * dice.random_range(FORMED.as_millis() as u32..CALM.as_millis() as u32);
            let mut wish = Wish::draw(number, at, dice);
            if self.kind == Kind::Calm && dice.random_bool(0.3) {
                wish.bad = true;
                match dice.random_range(0..3) {
                    0 => wish.prompt.push(100_000),
                    1 => wish.decoding.max_tokens = Some(30_000),
                    _ => wish.decoding.temperature = Some(-1.0),
                }
            }
            self.wishes.push(wish);
        }
        for number in busy..busy + 4 {
            let at = MS * dice.random_range(SETTLED.as_millis() as u32..LAST.as_millis() as u32);
            let drawn = Wish::draw(number, at, dice);
            let deadline = Duration::from_secs(30);
            self.wishes.push(Wish { sure: true, leave_after: None, deadline, ..drawn });
        }
    }

    fn draw_orders(&mut self, dice: &mut StdRng) {
        let at = |dice: &mut StdRng| MS * dice.random_range(1500..CALM.as_millis() as u32);
        for _ in 0..dice.random_range(0..4) {
            let threshold = f64::from(dice.random_range(1..20)) / 20.0;
            let model = loaded().name().to_owned();
            self.orders.push((at(dice), Order::Policy { model, block_size: 4, threshold }));
        }
        if self.kind == Kind::Everything && dice.random_bool(0.3) {
            let worker = dice.random_range(self.of(Role::Worker));
            self.orders.push((at(dice), Order::Drain(format!("w{worker}"))));
        }
    }

    /// A leader that does not know that another one leads, and connections that break meanwhile.
    fn depose(&mut self, dice: &mut StdRng) {
        let begin = dice.random_range(ticks(FORMED)..ticks(FORMED * 2));
        let lasts = ticks(DEPOSED);
        self.faults.push((begin, Fault::Depose { ticks: lasts }));
        for _ in 0..dice.random_range(2..8) {
            let (at, host) = (dice.random_range(lasts / 3..lasts), dice.random_range(self.of(Role::Controller)));
            self.faults.push((begin + at, Fault::ResetAll { host }));
        }
    }

    /// A fault that is over in `room` ticks at most; `None` when it would touch what is spared.
    fn draw_fault(&self, dice: &mut StdRng, room: u64) -> Option<Fault> {
        let mut host = || match self.kind {
            Kind::Leaders => dice.random_range(self.of(Role::Controller)),
            _ => dice.random_range(0..self.hosts() - 1),
        };
        let (one, other) = (host(), host());
        let mut last = |most: Duration| dice.random_range(10..ticks(most)).min(room);
        let (short, long) = (last(Duration::from_secs(3)), last(Duration::from_secs(9)));
        let leader = |host: HostId| self.role(host) == Role::Controller;
        if self.kind == Kind::Leaders {
            return Some(Fault::Kill { host: one, silent: false, ticks: short });
        }
        let fault = match dice.random_range(0..12) {
            0..=2 => Fault::Kill { host: one, silent: dice.random_bool(0.3), ticks: short },
            3 | 4 => Fault::Pause { host: one, ticks: long },
            5 | 6 => Fault::Cut { one, other, both: dice.random_bool(0.7), ticks: long },
            7 => Fault::Reset { one, other },
            8 => Fault::Slow { one, other, by: dice.random_range(2..60), ticks: long },
            9 if leader(one) => Fault::StoreAway { host: one, ticks: long },
            10 => Fault::LoseAnswers { percent: dice.random_range(5..50), ticks: long },
            11 if leader(one) => Fault::Drift { host: one, percent: dice.random_range(30..160), ticks: long },
            _ => Fault::Reset { one, other },
        };
        let touched = self.spared().is_some_and(|spared| fault.touches(spared));
        (!touched && one != other).then_some(fault)
    }
}
