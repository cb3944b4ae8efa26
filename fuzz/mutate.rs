//! A fuzzer for a stable compiler: the seeds of a target, changed at random, the same way for the same round.

use std::path::Path;

/// Most bytes that one round's file has.
const BYTES_MAX: usize = 64 << 10;

/// Numbers and pieces at the edges of what files may say.
const PIECES: [&str; 24] = [
    "0",
    "-1",
    "4294967296",
    "18446744073709551615",
    "1e999",
    "null",
    "true",
    "[",
    "]",
    "{",
    "}",
    "\"",
    ",",
    ":",
    "{{",
    "}}",
    "{%",
    "%}",
    " ~ ",
    "|",
    "(",
    ")",
    "messages",
    "\u{f8fe}",
];

/// A small generator: the rounds need no more, and must not change with a library.
pub struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit.max(1)
    }
}

/// Calls `target` with changed seeds, so many of them or as many as `UNMASK_FUZZ_ROUNDS` says.
pub fn fuzz(folder: &Path, seed: u64, rounds: u64, mut target: impl FnMut(&[u8])) {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries.collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let rounds = std::env::var("UNMASK_FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(rounds);
    for round in 0..rounds {
        let mut random = Random(seed.wrapping_add(round).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let bytes = mutated(&seeds, &mut random);
        // What crashes the process is found again here.
        let last = std::env::temp_dir().join(format!("unmask-fuzz-{}", folder.file_name().unwrap().to_str().unwrap()));
        std::fs::write(&last, &bytes).unwrap();
        let started = std::time::Instant::now();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target(&bytes)));
        let took = started.elapsed();
        assert!(result.is_ok() && took.as_secs() < 20, "round {round} took {took:?}: {}", last.display());
        let _ = std::fs::remove_file(last);
    }
}

fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 => bytes.truncate(at),
            2 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            3 => {
                let end = (at + random.below(64)).min(bytes.len());
                let again = bytes[at..end].repeat(1 + random.below(8));
                bytes.splice(at..at, again);
            }
            4 => {
                // A number becomes another.
                let digits = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |digit| at + digit);
                let end = digits + bytes[digits..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                bytes.splice(digits..end, PIECES[random.below(5)].bytes());
            }
            _ => {
                let end = (at + random.below(8)).min(bytes.len());
                bytes.splice(at..end, PIECES[random.below(PIECES.len())].bytes());
            }
        }
        bytes.truncate(BYTES_MAX);
    }
    bytes
}
