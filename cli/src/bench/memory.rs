//! How much memory of its own this process holds: resident and not backed by a file.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Between looks while something is watched.
const INTERVAL: Duration = Duration::from_millis(5);

/// Anonymous resident bytes of this process; 0 where the system does not tell.
pub fn anonymous_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status").map_or(0, |status| parse(&status))
}

/// `RssAnon` of Linux's `/proc/self/status`, in bytes.
fn parse(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Runs `work`; returns its result and the most memory seen meanwhile (bytes).
pub fn watched<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let (over, peak) = (AtomicBool::new(false), AtomicU64::new(anonymous_bytes()));
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                peak.fetch_max(anonymous_bytes(), Ordering::Relaxed);
                std::thread::sleep(INTERVAL);
            }
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        result
    });
    (result, peak.into_inner().max(anonymous_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found() {
        assert_eq!(parse("VmRSS:\t  90 kB\nRssAnon:\t    12 kB\nRssFile:\t 1 kB\n"), 12 << 10);
        assert_eq!(parse("VmRSS: 1 kB"), 0);
    }
}
