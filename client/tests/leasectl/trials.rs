//! Random trials: a command never runs past its lease. In each trial, the daemon or leasectl is
//! stopped or killed at a random moment while another leasectl waits for the key.
//! `LEASED_RUN_TRIALS` sets the number of trials; the default is 40.

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

/// How many trials run at the same time.
const AT_A_TIME: usize = 10;

/// A command that ignores SIGTERM. It writes its process group to a file, and then the time every
/// 2 ms.
const BEATS: &str = "
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(file, b'%d\\n' % os.getpgrp())
while True:
    os.write(file, b'%d\\n' % time.monotonic_ns())
    time.sleep(0.002)
";

/// What fails at the random moment.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The daemon is stopped, and continued later.
    DaemonStopped,
    /// The daemon is killed, and started again later.
    DaemonKilled,
    /// leasectl is stopped, and continued later.
    LeasectlStopped,
    /// leasectl is killed.
    LeasectlKilled,
    /// leasectl is stopped and its guardian is killed, so nothing ends the command. This shows that
    /// the trials would notice if leasectl did not do its work.
    Unguarded,
}

const FAULTS: [Fault; 4] =
    [Fault::DaemonStopped, Fault::DaemonKilled, Fault::LeasectlStopped, Fault::LeasectlKilled];

/// Returns the time in nanoseconds, by the clock that the commands use.
fn now() -> i128 {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap().as_nanos().try_into().unwrap()
}

/// Returns the path of the Python interpreter itself. On some machines `python3` is a slow wrapper
/// script.
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

/// Two commands that need the same key.
struct Trial {
    daemon: Daemon,
    folder: TempDir,
    ttl: Duration,
    first: Process,
    second: Process,
}

/// The result of a trial.
#[derive(Debug)]
struct Seen {
    /// When the first command ran for the last time.
    first_until: i128,
    /// When the second command ran for the first time.
    second_from: i128,
    /// When the first lease expires, if it is not touched after the fault.
    bound: i128,
    /// Whether the first lease cannot have been touched after the fault.
    was_silent: bool,
}

impl Trial {
    /// Starts both commands. On return the first command runs, and the second one waits for the
    /// key.
    fn start() -> Self {
        let ttl = random(Duration::from_millis(400), Duration::from_millis(800));
        let (daemon, folder) = (Daemon::start(), tempfile::tempdir().unwrap());
        let first = Self::begin(&daemon, ttl, &folder.path().join("first"));
        let run_second = || Self::run(&daemon, ttl, folder.path().join("second"));
        let mut second = run_second();
        // On a very busy machine the first lease may be lost already, so that the second command
        // runs. Or the second leasectl has ended, since it fails at once if the daemon does not
        // answer in time.
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

    /// Starts a command, and returns once it runs. On a busy machine the short lease may be lost at
    /// once; then the command is started again.
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

    /// Injects the fault, ends it after a random time, and returns what the commands have noted.
    fn go(mut self, fault: Fault) -> Seen {
        let outage = random(self.ttl / 3, self.ttl * 3 / 2);
        match fault {
            Fault::DaemonStopped => self.daemon.stop(),
            Fault::DaemonKilled => self.daemon.kill(),
            Fault::LeasectlStopped => self.first.stop(),
            Fault::LeasectlKilled => self.first.kill(),
            Fault::Unguarded => {
                self.first.stop();
                kill_process(self.group("first"), Signal::KILL).unwrap();
            }
        }
        let bound = now() + i128::try_from(self.ttl.as_nanos()).unwrap();
        sleep(outage);
        let was_silent = now() > bound || matches!(fault, Fault::LeasectlKilled | Fault::Unguarded);
        match fault {
            Fault::DaemonStopped => self.daemon.go_on(),
            Fault::DaemonKilled => self.daemon.restart(),
            Fault::LeasectlStopped => self.first.signal(Signal::CONT),
            Fault::LeasectlKilled | Fault::Unguarded => {}
        }
        // The first lease may have survived the fault. Killing leasectl ends it later.
        sleep(random(Duration::ZERO, self.ttl));
        if !matches!(fault, Fault::Unguarded) {
            self.first.kill();
        }
        let second = self.second();
        // If the first command still runs, it writes more lines during this sleep.
        sleep(self.ttl / 4);
        let seen = Seen {
            first_until: Self::last(&self.file("first")),
            second_from: second[1].parse().unwrap(),
            bound,
            was_silent,
        };
        if matches!(fault, Fault::Unguarded) {
            kill_process_group(self.group("first"), Signal::KILL).unwrap();
        }
        seen
    }

    /// Waits until the second command runs, and returns its lines. If its short lease was lost at
    /// once, the command is started again.
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

    /// Returns the number in the last complete line.
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
                    let fault = FAULTS[number % FAULTS.len()];
                    let seen = Trial::start().go(fault);
                    assert!(seen.is_safe(), "trial {number}, {fault:?}: {seen:?}");
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
fn the_trials_notice_a_command_that_runs_past_its_lease() {
    let seen = Trial::start().go(Fault::Unguarded);
    assert!(!seen.is_safe(), "{seen:?}");
}
