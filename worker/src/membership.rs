//! What this worker is to its controller: where it stands, in which epoch, and what it has been told to be.

use unmask_proto::v1::Seat;
use unmask_proto::watch;

/// Where a worker stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Of the pool, and assigned to nothing.
    Spare,
    /// Takes its seat; layers in memory (percent).
    Loading(u32),
    /// Serves, or computes its share for rank 0.
    Ready,
    /// Its group is over, or was never formed, and why.
    Fenced(String),
    /// Finishes what it holds.
    Draining,
}

/// Where a worker stands, in the epoch it was last assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    /// 0 before the first assignment.
    pub epoch: u64,
    pub readiness: Readiness,
}

/// What a worker of the pool has been told to be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Order {
    pub epoch: u64,
    /// `None`: a spare.
    pub seat: Option<Seat>,
}

/// Shared by the service, which checks, the join thread, which learns and reports, and whoever takes the seats.
#[derive(Debug)]
pub(crate) struct Membership {
    standing: watch::Sender<Standing>,
    orders: watch::Sender<Option<Order>>,
}

impl Membership {
    /// Assigned to nothing yet.
    pub(crate) fn new(readiness: Readiness) -> Self {
        Self { standing: watch::Sender::new(Standing { epoch: 0, readiness }), orders: watch::Sender::new(None) }
    }

    /// Where the worker stands.
    pub(crate) fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// The group's epoch; 0 before the first assignment.
    pub(crate) fn epoch(&self) -> u64 {
        self.standing.borrow().epoch
    }

    /// Takes an epoch unless it is below the present one; whether it was taken.
    pub(crate) fn raise_epoch(&self, epoch: u64) -> bool {
        let mut taken = false;
        self.standing.send_if_modified(|standing| {
            taken = epoch >= standing.epoch;
            let rises = epoch > standing.epoch;
            standing.epoch = standing.epoch.max(epoch);
            rises
        });
        taken
    }

    /// Takes an order unless its epoch is below the present one; whether it was taken. The present one again changes nothing.
    pub(crate) fn order(&self, order: Order) -> bool {
        let mut taken = false;
        self.standing.send_if_modified(|standing| {
            taken = order.epoch >= standing.epoch;
            let rises = order.epoch > standing.epoch;
            if rises {
                standing.epoch = order.epoch;
                // What was ready was another group.
                if standing.readiness != Readiness::Draining {
                    standing.readiness = if order.seat.is_some() { Readiness::Loading(0) } else { Readiness::Spare };
                }
                self.orders.send_replace(Some(order));
            }
            rises
        });
        taken
    }

    /// Whoever takes the seats says how it stands with that of `epoch`. Nothing when another has been ordered since, or
    /// the worker drains.
    pub(crate) fn stand(&self, epoch: u64, readiness: Readiness) {
        self.standing.send_if_modified(|standing| {
            let counts =
                standing.epoch == epoch && standing.readiness != Readiness::Draining && standing.readiness != readiness;
            if counts {
                standing.readiness = readiness;
            }
            counts
        });
    }

    /// From here on nothing new is taken.
    pub(crate) fn drain(&self) {
        self.standing.send_modify(|standing| standing.readiness = Readiness::Draining);
    }

    /// Changes of where it stands.
    pub(crate) fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// The last order, and those to come.
    pub(crate) fn orders(&self) -> watch::Receiver<Option<Order>> {
        self.orders.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_of_the_past_is_refused_and_what_was_ready_is_not_ready_in_the_next() {
        let membership = Membership::new(Readiness::Spare);
        let order = |epoch| Order { epoch, seat: Some(Seat { model: "m".into(), ..Seat::default() }) };
        assert!(membership.order(order(3)));
        membership.stand(3, Readiness::Ready);
        assert!(!membership.order(order(2)));
        // Said again after a reconnection.
        assert!(membership.order(order(3)));
        assert_eq!(membership.standing(), Standing { epoch: 3, readiness: Readiness::Ready });
        assert!(membership.order(order(4)));
        assert_eq!(membership.standing().readiness, Readiness::Loading(0));
        // The news of the group before comes late.
        membership.stand(3, Readiness::Fenced("gone".into()));
        assert_eq!(membership.standing().readiness, Readiness::Loading(0));
        membership.drain();
        membership.stand(4, Readiness::Ready);
        assert!(membership.order(Order { epoch: 5, seat: None }));
        assert_eq!(membership.standing(), Standing { epoch: 5, readiness: Readiness::Draining });
    }
}
