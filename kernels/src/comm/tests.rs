#![allow(clippy::unwrap_used)]

use super::*;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const LONG: Duration = Duration::from_secs(60);
/// Nobody gives up.
static GO: AtomicBool = AtomicBool::new(false);

fn soon() -> Instant {
    Instant::now() + LONG
}

fn tcp(ranks: usize) -> Vec<Comm> {
    let listeners: Vec<TcpListener> = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    thread::scope(|scope| {
        let forming: Vec<_> = listeners
            .iter()
            .enumerate()
            .map(|(rank, listener)| {
                let addresses = &addresses;
                scope.spawn(move || TcpRank::form(rank, 7, listener, addresses, soon(), &GO).unwrap())
            })
            .collect();
        forming.into_iter().map(|rank| Comm::Tcp(rank.join().unwrap())).collect()
    })
}

fn groups(ranks: usize) -> Vec<(&'static str, Vec<Comm>)> {
    vec![("threads", threads(ranks).into_iter().map(Comm::Threads).collect()), ("tcp", tcp(ranks))]
}

/// Runs `work` on every rank; results in order of rank.
fn on_all<T: Send>(group: Vec<Comm>, work: impl Fn(Comm) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let ranks: Vec<_> = group.into_iter().map(|comm| scope.spawn(|| work(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Values whose sum depends on the order in which they are added.
fn values(rank: usize, turn: usize) -> Vec<f32> {
    let mut state = (rank * 7919 + turn * 31 + 1) as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..1000 + turn).map(|i| next() * if i % 3 == 0 { 1e7 } else { 1.0 }).collect()
}

#[test]
fn i11_sums_have_the_bits_of_the_tree_on_every_rank() {
    for ranks in [1, 2, 4, 8] {
        for (name, group) in groups(ranks) {
            let sums = on_all(group, |mut comm| {
                let turns = (0..5).map(|turn| {
                    let mut mine = values(comm.rank(), turn);
                    comm.all_reduce(&mut mine, soon()).unwrap();
                    mine
                });
                turns.collect::<Vec<_>>()
            });
            for turn in 0..5 {
                let mut parts: Vec<Vec<f32>> = (0..ranks).map(|rank| values(rank, turn)).collect();
                while parts.len() > 1 {
                    parts = parts.chunks(2).map(|p| p[0].iter().zip(&p[1]).map(|(a, b)| a + b).collect()).collect();
                }
                assert!(sums.iter().all(|sums| sums[turn] == parts[0]), "{name}, {ranks} ranks");
            }
        }
    }
}

#[test]
fn records_and_plans_reach_everybody() {
    for ranks in [1, 2, 4, 8] {
        for (name, group) in groups(ranks) {
            let seen = on_all(group, |mut comm| {
                let mut all = vec![0; 3 * ranks];
                comm.all_gather(&[comm.rank() as u8, 1, 2], &mut all, soon()).unwrap();
                let mut plan = if comm.rank() == 0 { vec![9; 100_000] } else { Vec::new() };
                comm.broadcast(&mut plan, soon()).unwrap();
                (all, plan)
            });
            let expected: Vec<u8> = (0..ranks as u8).flat_map(|rank| [rank, 1, 2]).collect();
            assert!(seen.iter().all(|(all, plan)| *all == expected && *plan == [9; 100_000]), "{name}, {ranks} ranks");
        }
    }
}

/// Both partners send more than socket buffers hold before either reads: they must not wait for each other.
#[test]
fn large_sums_do_not_deadlock() {
    on_all(tcp(2), |mut comm| {
        let mut values = vec![1.0; 4 << 20];
        comm.all_reduce(&mut values, soon()).unwrap();
        assert!(values.iter().all(|&x| x == 2.0));
    });
}

#[test]
fn four_ranks_on_few_cores_raise_no_false_alarm() {
    for (_, group) in groups(4) {
        on_all(group, |mut comm| {
            for _ in 0..2000 {
                comm.all_reduce(&mut [1.0; 64], soon()).unwrap();
            }
        });
    }
}

#[test]
fn a_rank_that_ends_is_noticed_at_once() {
    for (name, group) in groups(4) {
        let begun = Instant::now();
        let errors = on_all(group, |mut comm| {
            if comm.rank() == 2 {
                return None;
            }
            Some(comm.all_reduce(&mut [1.0; 8], soon()).unwrap_err())
        });
        assert!(begun.elapsed() < LONG / 2, "{name} waited for the deadline");
        // A rank may see the lost one, or one that saw it first and left.
        assert!(errors.iter().flatten().all(|error| matches!(error, CommError::PeerLost { .. })), "{name}: {errors:?}");
    }
}

#[test]
fn a_rank_that_hangs_is_noticed_at_the_deadline_and_the_group_stays_over() {
    for (name, group) in groups(2) {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let told = std::sync::Mutex::new(told);
        let tell = std::sync::Mutex::new(Some(tell));
        let errors = on_all(group, |mut comm| {
            if comm.rank() == 1 {
                let _ = told.lock().unwrap().recv();
                return vec![];
            }
            let deadline = Instant::now() + Duration::from_millis(50);
            let first = comm.all_reduce(&mut [1.0], deadline).unwrap_err();
            assert!(Instant::now() >= deadline, "{name}: {first:?}");
            let again = comm.all_reduce(&mut [1.0], soon()).unwrap_err();
            drop(tell.lock().unwrap().take());
            vec![first, again]
        });
        assert!(
            matches!(&errors[0][..], [CommError::TimedOut { rank: 1, .. }, CommError::TimedOut { rank: 1, .. }]),
            "{name}: {errors:?}"
        );
    }
}

#[test]
fn an_abort_wakes_who_waits() {
    for (name, group) in groups(2) {
        let begun = Instant::now();
        let errors = on_all(group, |mut comm| {
            if comm.rank() == 1 {
                comm.abort_handle().abort();
            }
            comm.all_reduce(&mut [1.0], soon()).unwrap_err()
        });
        assert!(begun.elapsed() < LONG / 2, "{name} waited for the deadline");
        assert_eq!(errors[1], CommError::Aborted, "{name}");
    }
}

#[test]
fn nothing_to_add_up_is_no_message() {
    for (name, group) in groups(2) {
        let sums = on_all(group, |mut comm| {
            comm.all_reduce(&mut [], soon()).unwrap();
            comm.all_gather(&[], &mut [], soon()).unwrap();
            let mut value = [1.0];
            comm.all_reduce(&mut value, soon()).unwrap();
            value[0]
        });
        assert_eq!(sums, [2.0, 2.0], "{name}");
    }
}

#[test]
fn forming_can_be_given_up_and_waits_for_a_rank_that_comes_to_this_epoch_later() {
    let listeners: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let waits = scope.spawn(|| TcpRank::form(0, 6, &listeners[0], &addresses, soon(), &stop));
        stop.store(true, Ordering::Release);
        assert_eq!(waits.join().unwrap().err(), Some(CommError::Aborted));
        let late = scope.spawn(|| TcpRank::form(1, 7, &listeners[1], &addresses, soon(), &GO));
        // Whoever is of an earlier epoch learns it from the later one.
        let early = TcpRank::form(0, 6, &listeners[0], &addresses, soon(), &GO).err().unwrap();
        assert_eq!(early, CommError::Epoch { mine: 6, theirs: 7 });
        assert!(TcpRank::form(0, 7, &listeners[0], &addresses, soon(), &GO).is_ok());
        assert!(late.join().unwrap().is_ok());
    });
}

#[test]
fn a_rank_of_another_epoch_is_turned_away_and_the_group_forms_without_it() {
    let listeners: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    thread::scope(|scope| {
        let first = scope.spawn(|| TcpRank::form(0, 7, &listeners[0], &addresses, soon(), &GO));
        let stale = TcpRank::form(1, 6, &listeners[1], &addresses, soon(), &GO).err().unwrap();
        assert_eq!(stale, CommError::Epoch { mine: 6, theirs: 7 });
        assert!(TcpRank::form(1, 7, &listeners[1], &addresses, soon(), &GO).is_ok());
        assert!(first.join().unwrap().is_ok());
    });
}
