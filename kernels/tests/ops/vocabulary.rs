//! The vocabulary reduction: records, ties, draws.

use super::*;
use unmask_kernels::gumbel;

/// A head whose logits spread over several units, and bans at its edges.
pub(crate) struct Vocabulary {
    k: usize,
    n: usize,
    pub(crate) weights: Vec<f32>,
    pub(crate) hidden: Vec<f32>,
    pub(crate) bans: Bans,
    draws: Vec<Draw>,
}

impl Vocabulary {
    pub(crate) fn new(n: usize, k: usize, rows: usize, noise: &mut Noise) -> Vocabulary {
        let bans = match n {
            1 => Bans { vocab: 1, ..Bans::default() },
            _ => {
                let last = n as u32 - 1;
                let argmax = (0..n as u32).filter(|id| id % 7 == 3).collect();
                Bans { vocab: n - n / 10, argmax, softmax: if n > 600 { vec![1, 511, 512, last] } else { vec![1] } }
            }
        };
        let draws = (0..rows as u32)
            .map(|r| Draw { temperature: [0.0, 0.7, 1.5][r as usize % 3], key: [r, noise.next() as u32] })
            .collect();
        Vocabulary { k, n, weights: noise.values(n * k), hidden: noise.values(rows * k), bans, draws }
    }

    fn reduce(&self, cpu: &Cpu, dtype: WeightType, rows: std::ops::Range<usize>) -> Vec<Record> {
        let head = cpu.pack(self.n, self.k, &self.weights, dtype);
        let mut out = vec![Record::default(); rows.len()];
        let hidden = &self.hidden[rows.start * self.k..rows.end * self.k];
        cpu.vocab_reduce(hidden, &head, &self.bans, &self.draws[rows], &mut out);
        out
    }

    pub(crate) fn check(&self, cpu: &Cpu, dtype: WeightType) {
        let rows = self.draws.len();
        let records = self.reduce(cpu, dtype, 0..rows);
        let mut logits = vec![0.0; rows * self.n];
        cpu.logits(&self.hidden, &cpu.pack(self.n, self.k, &self.weights, dtype), &mut logits);
        for ((record, logits), draw) in records.iter().zip(logits.chunks_exact(self.n)).zip(&self.draws) {
            let logits: Vec<f64> = logits.iter().map(|&v| f64::from(v)).collect();
            self.check_record(record, &logits, draw);
        }
    }

    fn check_record(&self, record: &Record, logits: &[f64], draw: &Draw) {
        let expected = reference::reduce(logits, &self.bans, draw);
        assert_eq!(f64::from(record.max), expected.max);
        assert_eq!((record.argmax, f64::from(record.best)), (expected.argmax, expected.best));
        assert_eq!(f64::from(record.second), expected.second);
        assert_close(&[record.sum_exp, record.sum_x_exp], &[expected.sum_exp, expected.sum_x_exp], 2e-6, "sums");
        let probability = |x: f64| (x - expected.max).exp() / expected.sum_exp;
        let entropy = expected.sum_exp.ln() - expected.sum_x_exp / expected.sum_exp;
        let margin = probability(expected.best) - probability(expected.second);
        assert_close(&[record.entropy(), record.margin()], &[entropy, margin], 2e-6, "entropy and margin");
        assert_close(&[record.confidence()], &[probability(f64::from(record.chosen_logit))], 1e-6, "confidence");
        assert_eq!(f64::from(record.chosen_logit), logits[record.chosen as usize]);
        // The f32 scores may order two ids that f64 holds apart by less than their rounding.
        let score = |id: u32| match draw.temperature > 0.0 {
            true => logits[id as usize] / f64::from(draw.temperature) + f64::from(gumbel(draw.key, id)),
            false => logits[id as usize],
        };
        assert!((score(record.chosen) - score(expected.chosen)).abs() < 1e-4, "{record:?} {expected:?}");
    }
}

#[test]
fn vocab_reduce_agrees_with_the_reference() {
    for cpu in cpus() {
        for (n, k, rows) in [(1, 8, 2), (300, 33, 5), (512, 16, 3), (1000, 64, 17), (5000, 48, 33)] {
            let vocabulary = Vocabulary::new(n, k, rows, &mut Noise(n as u64));
            vocabulary.check(&cpu, WeightType::F32);
            vocabulary.check(&cpu, WeightType::Bf16);
        }
    }
}

#[test]
fn i1_i4_records_do_not_depend_on_batch_or_threads() {
    for isa in Isa::available() {
        for dtype in [WeightType::F32, WeightType::Bf16] {
            let vocabulary = Vocabulary::new(5000, 40, 37, &mut Noise(3));
            let expected = vocabulary.reduce(&Cpu::new(isa, 1), dtype, 0..37);
            for threads in 1..=4 {
                let cpu = Cpu::new(isa, threads);
                assert_eq!(vocabulary.reduce(&cpu, dtype, 0..37), expected, "{} threads {threads}", isa.name());
                for row in [0, 15, 16, 36] {
                    let alone = vocabulary.reduce(&cpu, dtype, row..row + 1);
                    assert_eq!(alone[0], expected[row], "{} row {row} alone", isa.name());
                }
            }
        }
    }
}

/// A head of one input column: logits are the column itself.
fn column(logits: &[f32], temperature: f32, rows: usize) -> Vocabulary {
    let bans = Bans { vocab: logits.len(), ..Bans::default() };
    let draws = (0..rows as u32).map(|r| Draw { temperature, key: [r, 77] }).collect();
    Vocabulary { k: 1, n: logits.len(), weights: logits.to_vec(), hidden: vec![1.0; rows], bans, draws }
}

#[test]
fn i3_ties_go_to_the_lowest_id() {
    let mut logits = vec![0.0; 2000];
    for at in [700, 699, 1999, 1200] {
        logits[at] = 3.0;
    }
    for cpu in cpus() {
        let mut vocabulary = column(&logits, 0.0, 1);
        let record = vocabulary.reduce(&cpu, WeightType::F32, 0..1)[0];
        assert_eq!((record.argmax, record.best, record.second, record.chosen), (699, 3.0, 3.0, 699));
        vocabulary.bans.argmax = vec![699, 700];
        assert_eq!(vocabulary.reduce(&cpu, WeightType::F32, 0..1)[0].argmax, 1200);
        vocabulary.bans.vocab = 1200;
        let record = vocabulary.reduce(&cpu, WeightType::F32, 0..1)[0];
        assert_eq!((record.argmax, record.max), (0, 3.0));
    }
}

#[test]
fn logits_that_are_not_numbers_never_win() {
    for cpu in cpus() {
        for temperature in [0.0, 1.0, f32::INFINITY] {
            let mut logits = vec![f32::NAN; 1500];
            let record = column(&logits, temperature, 1).reduce(&cpu, WeightType::F32, 0..1)[0];
            assert_eq!((record.argmax, record.chosen, record.confidence()), (0, 0, 0.0));
            logits[900] = -5.0;
            let mut vocabulary = column(&logits, temperature, 1);
            vocabulary.bans.argmax = vec![0, 1];
            let record = vocabulary.reduce(&cpu, WeightType::F32, 0..1)[0];
            assert_eq!((record.argmax, record.chosen, record.sum_exp), (900, 900, 1.0));
            assert_eq!(record.confidence(), 1.0);
            assert!(record.entropy() < 1e-30);
        }
        let record = column(&[1.0, f32::INFINITY, 0.0], 0.5, 1).reduce(&cpu, WeightType::F32, 0..1)[0];
        assert_eq!(record.argmax, 1);
    }
}

#[test]
fn chosen_tokens_follow_the_softmax() {
    let logits: Vec<f32> = [2.0, 1.0, 0.0, -1.0, 1.5, 0.5].repeat(2);
    let (rows, temperature) = (20_000, 0.8);
    for cpu in cpus() {
        let mut vocabulary = column(&logits, temperature, rows);
        vocabulary.bans.argmax = vec![4];
        let mut counts = vec![0.0f64; logits.len()];
        for record in vocabulary.reduce(&cpu, WeightType::F32, 0..rows) {
            counts[record.chosen as usize] += 1.0 / rows as f64;
        }
        let weight = |id: usize| if id == 4 { 0.0 } else { f64::from(logits[id] / temperature).exp() };
        let total: f64 = (0..logits.len()).map(weight).sum();
        for (id, &count) in counts.iter().enumerate() {
            let p = weight(id) / total;
            let deviation = (p * (1.0 - p) / rows as f64).sqrt();
            assert!((count - p).abs() <= 4.5 * deviation, "id {id}: {count} for {p}");
        }
    }
}
