//! Runs Python programs that nobody trusts: each in a process of its own, with limits on time and memory, and on
//! Linux without sockets, processes, signals and written files.

use super::Task;
use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Interpreter to run programs with.
const PYTHON: &str = "python3";
/// The process that forks one child per program, and what a child may do.
const DRIVER: &str = concat!(include_str!("sandbox.py"), include_str!("driver.py"));

/// What a program may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Wall clock of one program.
    pub time: Duration,
    /// Address space of one program in bytes.
    pub memory_bytes: u64,
    /// Programs at once.
    pub processes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { time: Duration::from_secs(2), memory_bytes: 512 << 20, processes: 2 }
    }
}

/// Source to run; it passes when it ends without an exception.
#[derive(Debug, Clone, Serialize)]
pub struct Program {
    source: String,
}

impl Program {
    /// A task's function with `body`, and its tests.
    pub fn of(task: &Task, body: &str) -> Program {
        let Task { prompt, test, entry_point, .. } = task;
        Program { source: format!("{prompt}{body}\n\n{test}\n\ncheck({entry_point})\n") }
    }

    /// Source that must run and define a function.
    pub fn defining(source: &str) -> Program {
        const CHECK: &str =
            "import types\nassert any(isinstance(v, types.FunctionType) for v in list(globals().values()))";
        Program { source: format!("{source}\n\n{CHECK}\n") }
    }

    /// A program that only parses `source`.
    pub fn parsing(source: &str) -> Program {
        let literal = serde_json::Value::from(source);
        Program { source: format!("import ast\nast.parse({literal})\n") }
    }
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Without an exception.
    Passed,
    /// With an exception, or killed by a limit on memory or files.
    Failed(String),
    /// Not within its time.
    TimedOut,
}

#[derive(Deserialize)]
struct Answer {
    outcome: String,
    detail: String,
}

/// Runs programs; outcomes in the order of the programs.
///
/// # Errors
/// The interpreter cannot be started or broke.
pub fn run(programs: &[Program], limits: &Limits) -> anyhow::Result<Vec<Outcome>> {
    let answers = answers(programs, limits)?;
    Ok(answers
        .into_iter()
        .map(|answer| match answer.outcome.as_str() {
            "passed" => Outcome::Passed,
            "timeout" => Outcome::TimedOut,
            _ => Outcome::Failed(answer.detail),
        })
        .collect())
}

fn answers(programs: &[Program], limits: &Limits) -> anyhow::Result<Vec<Answer>> {
    let share = programs.len().div_ceil(limits.processes.max(1)).max(1);
    let parts: Vec<anyhow::Result<Vec<Answer>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = programs.chunks(share).map(|part| scope.spawn(move || run_part(part, limits))).collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|_| bail!("a verifier thread panicked"))).collect()
    });
    let mut all = Vec::with_capacity(programs.len());
    for part in parts {
        all.extend(part?);
    }
    Ok(all)
}

fn run_part(programs: &[Program], limits: &Limits) -> anyhow::Result<Vec<Answer>> {
    let mut driver = Driver::start(limits)?;
    let mut all = Vec::with_capacity(programs.len());
    for program in programs {
        all.push(match driver.ask(program) {
            Ok(answer) => answer,
            Err(error) => {
                // It did what no other did before: that is its failure, and nobody else's.
                driver = Driver::start(limits)?;
                Answer { outcome: "failed".into(), detail: format!("{error:#}") }
            }
        });
    }
    Ok(all)
}

/// A driver answers within the time of a program and this much more, or is given up.
const ANSWER_SLACK: Duration = Duration::from_secs(20);

struct Driver {
    child: Child,
    requests: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Driver {
    /// Starts a driver and has it run an empty program: what keeps every program from running is an error at once.
    fn start(limits: &Limits) -> anyhow::Result<Driver> {
        // Sockets: unlike pipes, no program can open them once more by way of /proc.
        let (requests, theirs) = UnixStream::pair()?;
        requests.set_read_timeout(Some(limits.time + ANSWER_SLACK))?;
        requests.set_write_timeout(Some(limits.time + ANSWER_SLACK))?;
        let child = Command::new(PYTHON)
            .args(["-I", "-c", DRIVER])
            .arg(limits.time.as_secs_f64().to_string())
            .arg(limits.memory_bytes.to_string())
            .stdin(OwnedFd::from(theirs.try_clone()?))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {PYTHON}, which runs the tasks' tests"))?;
        let answers = BufReader::new(requests.try_clone()?);
        let mut driver = Driver { child, requests, answers };
        let answer = driver.ask(&Program { source: String::new() }).context("the verifier does not work")?;
        ensure!(answer.outcome == "passed", "programs cannot be run: {}", answer.detail);
        Ok(driver)
    }

    fn ask(&mut self, program: &Program) -> anyhow::Result<Answer> {
        let mut request = serde_json::to_vec(program)?;
        request.push(b'\n');
        self.requests.write_all(&request)?;
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the verifier does not answer")?;
        ensure!(!line.is_empty(), "the verifier ended");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tasks whose tests assert what their own solution returns. Tasks whose solution does not run are left out.
///
/// # Errors
/// As [`run`].
pub fn with_expected_results(tasks: &[Task]) -> anyhow::Result<Vec<Task>> {
    let calls: Vec<Vec<&str>> = tasks
        .iter()
        .map(|task| task.test.lines().skip(1).filter_map(|l| l.trim().strip_prefix("candidate")).collect())
        .collect();
    let programs: Vec<Program> = tasks
        .iter()
        .zip(&calls)
        .map(|(task, calls)| {
            let name = &task.entry_point;
            let recorded: String = calls.iter().map(|call| format!("RESULTS.append(repr({name}{call}))\n")).collect();
            Program { source: format!("{}\n\n{recorded}", task.program()) }
        })
        .collect();
    let mut kept = Vec::new();
    for ((task, calls), answer) in tasks.iter().zip(&calls).zip(answers(&programs, &Limits::default())?) {
        if answer.outcome != "passed" {
            tracing::warn!(task = task.task_id, detail = answer.detail, "a solution does not run");
            continue;
        }
        let results: Vec<String> = serde_json::from_str(&answer.detail)?;
        let lines: String = calls
            .iter()
            .zip(results)
            .map(|(call, result)| format!("    assert candidate{call} == {result}\n"))
            .collect();
        kept.push(Task { test: format!("def check(candidate):\n{lines}"), ..task.clone() });
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn outcome(source: &str) -> Outcome {
        let limits = Limits { time: Duration::from_secs(1), memory_bytes: 256 << 20, processes: 1 };
        // What follows a hostile program must still run.
        let programs = [source, "x = 1"].map(|source| Program { source: source.into() });
        let mut outcomes = run(&programs, &limits).unwrap();
        assert_eq!(outcomes.pop(), Some(Outcome::Passed));
        outcomes.remove(0)
    }

    #[test]
    fn hostile_programs_end() {
        assert_eq!(outcome("while True: pass"), Outcome::TimedOut);
        assert_eq!(outcome("import time\ntime.sleep(60)"), Outcome::TimedOut);
        for source in [
            "x = 'a' * (1 << 40)",
            "import sys\nsys.exit(0)",
            "import os\nos._exit(0)",
            "import os\nos.kill(os.getpid(), 9)",
            "import os\nos.write(os.open('/tmp/unmask-hostile', os.O_CREAT | os.O_WRONLY), b'x')",
            "1 / 0",
            "def",
            "raise KeyboardInterrupt",
        ] {
            assert!(matches!(outcome(source), Outcome::Failed(_)), "{source}");
        }
        assert_eq!(outcome("print('x' * 10_000_000)"), Outcome::Passed);
    }

    /// What needs no filter to fail is in the list above.
    #[cfg(target_os = "linux")]
    #[test]
    fn programs_can_only_compute_and_read() {
        for source in [
            "import socket\nsocket.socket()",
            "import socket\nsocket.socketpair()",
            "import os\nos.fork()",
            "import subprocess\nsubprocess.run(['true'])",
            "import threading\nthreading.Thread(target=print).start()",
            "import os\nos.execv('/bin/true', ['true'])",
            "import os\nos.kill(os.getppid(), 0)",
            "import os\nos.unlink('/tmp/unmask-hostile')",
            "import os\nos.mkdir('/tmp/unmask-hostile-folder')",
            "import os\nos.symlink('/', '/tmp/unmask-hostile-link')",
            "import os\nos.chmod('/tmp', 0o777)",
            "import os\nos.mkfifo('/tmp/unmask-hostile-pipe')",
            "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, 1)",
            "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))",
            "open('/tmp/unmask-hostile', 'w')",
            "open('/tmp/unmask-hostile', 'r+')",
        ] {
            let Outcome::Failed(detail) = outcome(source) else { panic!("{source}") };
            assert!(!detail.contains("sandbox"), "{detail}");
        }
        assert_eq!(
            outcome("import re, math, random, hashlib, decimal\nassert open('/proc/self/stat').read()"),
            Outcome::Passed
        );
        assert_eq!(outcome("import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) == -1"), Outcome::Passed);
    }

    /// Each is a failure of its own; the verifier goes on.
    #[test]
    fn nothing_a_program_says_breaks_the_verifier() {
        let all = "import os\nfor number in range(3, 64):\n    try: os.write(number, WHAT)\n    except OSError: pass\nos._exit(0)";
        for what in ["b'[' * 60000", "b'[1, 2, 3]'", "b'\\xff\\xfe'", "b'null'"] {
            assert!(matches!(outcome(&all.replace("WHAT", what)), Outcome::Failed(_)), "{what}");
        }
        let Outcome::Failed(detail) = outcome("raise ValueError(chr(0xd800))") else { panic!() };
        assert!(detail.starts_with("ValueError"), "{detail}");
    }

    /// Those who run other programs are left alone: their ends cannot be opened once more.
    #[cfg(target_os = "linux")]
    #[test]
    fn other_processes_cannot_be_listened_to() {
        let source = "import os\nopened = []\nfor pid in [os.getppid()]:\n    for fd in (0, 1):\n        try: opened.append(os.open(f'/proc/{pid}/fd/{fd}', os.O_RDONLY))\n        except OSError: pass\nassert not opened";
        assert_eq!(outcome(source), Outcome::Passed);
    }

    #[test]
    fn an_answer_cannot_be_written_by_the_program() {
        let forged = "import os\nfor number in range(3, 64):\n    try: os.write(number, b'[\"\", \"passed\", \"[]\"]')\n    except OSError: pass\nos._exit(0)";
        assert!(matches!(outcome(forged), Outcome::Failed(_)));
        let endless = "import os\nwhile True:\n    for number in range(3, 64):\n        try: os.write(number, b'x' * 60000)\n        except OSError: pass";
        assert!(matches!(outcome(endless), Outcome::Failed(_) | Outcome::TimedOut));
        let drop_by_drop =
            endless.replace("b'x' * 60000", "b'x'").replace("    for", "    __import__('time').sleep(0.3)\n    for");
        assert_eq!(outcome(&drop_by_drop), Outcome::TimedOut);
    }
}
