//! A command never runs past its lease: at random moments the daemon or leasectl is stopped or killed, while another waits for
//! the key. `LEASED_RUN_TRIALS` says how often; 40 times unless it does.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{scope, sleep};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Daemon, Process, end, lines, until};

/// So many at a time.
const AT_A_TIME: usize = 10;

/// A command that does not heed SIGTERM, and notes every 2 ms that it is there. Its first line is its process group.
const BEATS: &str = "
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(file, b'%d\\n' % os.getpgrp())
while True:
    os.write(file, b'%d\\n' % time.monotonic_ns())
    time.sleep(0.002)
";

/// What happens at the random moment.
#[derive(Debug, Clone, Copy)]
enum Mishap {
    /// The daemon is stopped, and goes on later.
    DaemonStopped,
    /// The daemon is killed, and started again later.
    DaemonKilled,
    /// leasectl is stopped, and goes on later.
    LeasectlStopped,
    /// leasectl is killed.
    LeasectlKilled,
    /// Nothing is left that could end the command: what these trials would show if leasectl did not do its work.
    Unguarded,
}

const MISHAPS: [Mishap; 4] =
    [Mishap::DaemonStopped, Mishap::DaemonKilled, Mishap::LeasectlStopped, Mishap::LeasectlKilled];

/// The clock that commands note, in nanoseconds.
fn now() -> i128 {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap().as_nanos().try_into().unwrap()
}

/// Python itself, where `python3` is a script that looks for it each time.
fn python() -> &'static str {
    static PYTHON: OnceLock<String> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let asked = end(Command::new("python3").args(["-c", "import sys; print(sys.executable)"]));
        asked.stdout.trim().to_owned()
    })
}

fn random(from: Duration, to: Duration) -> Duration {
    from + (to - from).mul_f64(fastrand::f64())
}

/// Two commands for one key.
struct Trial {
    daemon: Daemon,
    folder: TempDir,
    ttl: Duration,
    first: Process,
    second: Process,
}

/// How a trial went.
#[derive(Debug)]
struct Seen {
    /// When the first command was there for the last time.
    first_until: i128,
    /// When the second one was there for the first time.
    second_from: i128,
    /// When another could have had the key, if nobody had touched it since the mishap.
    bound: i128,
    /// Nobody can have touched it since.
    was_silent: bool,
}

impl Trial {
    /// The first command runs, and the second one waits.
    fn start() -> Self {
        let ttl = random(Duration::from_millis(400), Duration::from_millis(800));
        let (daemon, folder) = (Daemon::start(), tempfile::tempdir().unwrap());
        let first = Self::begin(&daemon, ttl, &folder.path().join("first"));
        let run_second = || Self::run(&daemon, ttl, folder.path().join("second"));
        let mut second = run_second();
        // On a machine that is too busy the first one may have been lost by now, or the second one have given up: it tells at
        // once that its daemon does not answer in time.
        until(|| {
            let waits = |key: &Value| !key["waiters"].as_array().unwrap().is_empty();
            let is_there = folder.path().join("second").exists();
            if !is_there && !second.is_running() {
                second = run_second();
            }
            is_there || daemon.is_key("a/key", waits)
        });
        sleep(random(Duration::ZERO, ttl));
        Self { daemon, folder, ttl, first, second }
    }

    /// The first command, once it is there: on a machine that is busy with many such starts a short lease may be lost at once.
    fn begin(daemon: &Daemon, ttl: Duration, file: &Path) -> Process {
        loop {
            let mut first = Self::run(daemon, ttl, file.to_owned());
            let is_there = || read_to_string(file).unwrap_or_default().lines().count() >= 3;
            until(|| is_there() || !first.is_running());
            if first.is_running() {
                return first;
            }
            drop(std::fs::remove_file(file));
        }
    }

    fn run(daemon: &Daemon, ttl: Duration, file: PathBuf) -> Process {
        let ttl = format!("{}ms", ttl.as_millis());
        let mut command: Command = daemon.leasectl(&["run", "a/key", "--ttl", &ttl]);
        command.args(["--", python(), "-c", BEATS]).arg(file).stderr(Stdio::null());
        Process::spawn(&mut command)
    }

    /// Has the mishap happen, and what follows.
    fn go(mut self, mishap: Mishap) -> Seen {
        let outage = random(self.ttl / 3, self.ttl * 3 / 2);
        match mishap {
            Mishap::DaemonStopped => self.daemon.stop(),
            Mishap::DaemonKilled => self.daemon.kill(),
            Mishap::LeasectlStopped => self.first.stop(),
            Mishap::LeasectlKilled => self.first.kill(),
            Mishap::Unguarded => {
                self.first.stop();
                kill_process(self.group("first"), Signal::KILL).unwrap();
            }
        }
        let bound = now() + i128::try_from(self.ttl.as_nanos()).unwrap();
        sleep(outage);
        let was_silent = now() > bound || matches!(mishap, Mishap::LeasectlKilled | Mishap::Unguarded);
        match mishap {
            Mishap::DaemonStopped => self.daemon.go_on(),
            Mishap::DaemonKilled => self.daemon.restart(),
            Mishap::LeasectlStopped => self.first.signal(Signal::CONT),
            Mishap::LeasectlKilled | Mishap::Unguarded => {}
        }
        // A lease that has survived does not last, either.
        sleep(random(Duration::ZERO, self.ttl));
        if !matches!(mishap, Mishap::Unguarded) {
            self.first.kill();
        }
        let second = self.second();
        // A command that lives on is noticed by what it notes from now on.
        sleep(self.ttl / 4);
        let seen = Seen {
            first_until: Self::last(&self.file("first")),
            second_from: second[1].parse().unwrap(),
            bound,
            was_silent,
        };
        if matches!(mishap, Mishap::Unguarded) {
            kill_process_group(self.group("first"), Signal::KILL).unwrap();
        }
        seen
    }

    /// What the second command has noted, once it is there: it, too, may have been lost at once, and is then begun again.
    fn second(&mut self) -> Vec<String> {
        let file = self.file("second");
        let is_there = || read_to_string(&file).unwrap_or_default().matches('\n').count() >= 2;
        until(|| is_there() || !self.second.is_running());
        if !is_there() {
            drop(std::fs::remove_file(&file));
            self.second = Self::begin(&self.daemon, self.ttl, &file);
        }
        lines(&file, 2)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn group(&self, name: &str) -> Pid {
        lines(&self.file(name), 1)[0].parse().ok().and_then(Pid::from_raw).unwrap()
    }

    /// The last whole line.
    fn last(file: &Path) -> i128 {
        let text = read_to_string(file).unwrap();
        text[..=text.rfind('\n').unwrap()].lines().last().unwrap().parse().unwrap()
    }
}

impl Seen {
    fn is_safe(&self) -> bool {
        self.first_until < self.second_from && (!self.was_silent || self.first_until <= self.bound)
    }
}

#[test]
fn a_command_never_runs_past_its_lease() {
    let trials = std::env::var("LEASED_RUN_TRIALS").map_or(40, |number| number.parse().unwrap());
    let (next, least) = (AtomicUsize::new(0), Mutex::new(i128::MAX));
    scope(|scope| {
        for _ in 0..AT_A_TIME.min(trials) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= trials {
                        return;
                    }
                    let mishap = MISHAPS[number % MISHAPS.len()];
                    let seen = Trial::start().go(mishap);
                    assert!(seen.is_safe(), "trial {number}, {mishap:?}: {seen:?}");
                    let mut least = least.lock().unwrap();
                    *least = (*least).min(seen.second_from - seen.first_until);
                }
            });
        }
    });
    let least = *least.lock().unwrap() / 1_000_000;
    println!("{trials} trials; at least {least} ms between one command and the next");
}

#[test]
fn a_command_that_does_run_past_its_lease_is_noticed() {
    let seen = Trial::start().go(Mishap::Unguarded);
    assert!(!seen.is_safe(), "{seen:?}");
}
