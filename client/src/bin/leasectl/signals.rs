//! Signals that are passed on, as they come.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, getpid, kill_current_process_group};
use signal_hook::flag;
use signal_hook::low_level::emulate_default_handler;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Those that end a program that does not heed them.
pub(crate) const ENDING: &[Signal] = &[Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM];
/// The others that a command is told of.
pub(crate) const OTHER: &[Signal] = &[Signal::USR1, Signal::USR2, Signal::WINCH, Signal::TSTP, Signal::CONT];

/// Signals that wait to be passed on. The same one twice may come as one, as with the system itself.
const WAITING: usize = 32;

/// Signals to this process. What it was started to ignore, as by `nohup`, it and its command go on ignoring.
pub(crate) struct Signals {
    sender: mpsc::Sender<Signal>,
    receiver: mpsc::Receiver<Signal>,
    /// The signals that this process was started to ignore, a bit each.
    ignored: u64,
    /// The signals that [`next`](Self::next) has returned, a bit each.
    taken: u64,
    /// A SIGTSTP has come that [`next`](Self::next) has not returned.
    stop: Arc<AtomicBool>,
}

impl Signals {
    pub(crate) fn new(wanted: &[Signal]) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let signals = Self { sender, receiver, ignored: ignored(), taken: 0, stop: Arc::default() };
        signals.add(wanted)?;
        Ok(signals)
    }

    /// Hears of these, too.
    pub(crate) fn add(&self, wanted: &[Signal]) -> io::Result<()> {
        for &wanted in wanted {
            if self.ignored & bit(wanted) != 0 {
                continue;
            }
            if wanted == Signal::TSTP {
                flag::register(wanted.as_raw(), Arc::clone(&self.stop))?;
            }
            let mut signals = signal(SignalKind::from_raw(wanted.as_raw()))?;
            let sender = self.sender.clone();
            // Ends with the process.
            tokio::spawn(async move {
                while signals.recv().await.is_some() && sender.send(wanted).await.is_ok() {}
            });
        }
        Ok(())
    }

    pub(crate) async fn next(&mut self) -> Signal {
        loop {
            match self.receiver.recv().await {
                Some(Signal::TSTP) if !self.stop.swap(false, Ordering::Relaxed) => {}
                Some(signal) => {
                    self.taken |= bit(signal);
                    return signal;
                }
                // Does not happen: a sender is at hand.
                None => std::future::pending().await,
            }
        }
    }

    /// Waits for so many of the [`ENDING`] signals, and returns the last of them.
    pub(crate) async fn ending(&mut self, count: usize) -> Signal {
        let mut left = count;
        loop {
            let signal = self.next().await;
            if ENDING.contains(&signal) {
                left -= 1;
                if left == 0 {
                    return signal;
                }
            }
        }
    }

    /// Ignores the SIGTSTP that has come so far. [`next`](Self::next) could return that after a SIGCONT that came later.
    pub(crate) fn forget_stop(&self) {
        self.stop.store(false, Ordering::Relaxed);
    }

    /// Whether [`next`](Self::next) has returned this signal.
    pub(crate) fn has_come(&self, signal: Signal) -> bool {
        self.taken & bit(signal) != 0
    }
}

/// Who is to be ended by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// This process.
    Myself,
    /// This process and the rest of its process group.
    Group,
}

/// Ends this process by the default action of a signal, so that a shell that waits for it sees a death by that signal.
///
/// A shell goes on with the next line of a script when a program that was interrupted exits by itself, whatever its exit
/// code. Returns only in the first process of a container, which the default action cannot end.
pub(crate) fn die_of(signal: Signal, target: Target) {
    if getpid().is_init() {
        return;
    }
    if signal == Signal::QUIT {
        // The command's core dump is of use, leasectl's is not.
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    }
    if target == Target::Group {
        // This process has a handler for it, and goes on to the next line.
        let _ = kill_current_process_group(signal);
    }
    let _ = emulate_default_handler(signal.as_raw());
}

/// A signal's bit in a mask.
fn bit(signal: Signal) -> u64 {
    1 << (signal.as_raw() - 1)
}

/// The signals that this process was started to ignore, a bit each (`SigIgn` in proc(5)); none where there is no such file.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
