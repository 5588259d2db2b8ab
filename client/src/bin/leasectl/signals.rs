//! Signals: receives them in order, and ends this process by one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, getpid, kill_current_process_group};
use signal_hook::flag;
use signal_hook::low_level::emulate_default_handler;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// The signals that end a program by default.
pub(crate) const ENDING: &[Signal] = &[Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM];
/// The other signals that are passed on to a command.
pub(crate) const OTHER: &[Signal] = &[Signal::USR1, Signal::USR2, Signal::WINCH, Signal::TSTP, Signal::CONT];

/// The most signals that are received and not yet returned.
const WAITING: usize = 32;

/// Signals to this process. Two of one kind may be received as one: the system itself may merge
/// them. Signals that this process was started to ignore, as by `nohup`, stay ignored by this
/// process and its command.
pub(crate) struct Signals {
    sender: mpsc::Sender<Signal>,
    receiver: mpsc::Receiver<Signal>,
    /// The signals that this process was started to ignore, one bit each.
    ignored: u64,
    /// The signals that [`next`](Self::next) has returned, one bit each.
    returned: u64,
    /// Whether a SIGTSTP has arrived that [`next`](Self::next) has not returned.
    stop: Arc<AtomicBool>,
}

impl Signals {
    /// Receives `signals` from now on.
    pub(crate) fn new(signals: &[Signal]) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let received = Self { sender, receiver, ignored: ignored(), returned: 0, stop: Arc::default() };
        received.add(signals)?;
        Ok(received)
    }

    /// Receives `signals` as well from now on.
    pub(crate) fn add(&self, signals: &[Signal]) -> io::Result<()> {
        for &one in signals {
            if self.ignored & bit(one) != 0 {
                continue;
            }
            // `forget_stop` clears this flag, so that `next` drops a SIGTSTP from the channel.
            if one == Signal::TSTP {
                flag::register(one.as_raw(), Arc::clone(&self.stop))?;
            }
            let mut notices = signal(SignalKind::from_raw(one.as_raw()))?;
            let sender = self.sender.clone();
            // The task ends with the process.
            tokio::spawn(
                async move { while notices.recv().await.is_some() && sender.send(one).await.is_ok() {} },
            );
        }
        Ok(())
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> Signal {
        loop {
            match self.receiver.recv().await {
                Some(Signal::TSTP) if !self.stop.swap(false, Ordering::Relaxed) => {}
                Some(signal) => {
                    self.returned |= bit(signal);
                    return signal;
                }
                // Cannot happen: `self` holds a sender.
                None => std::future::pending().await,
            }
        }
    }

    /// Waits for `count` of the [`ENDING`] signals, and returns the last of them.
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

    /// Drops a SIGTSTP that [`next`](Self::next) has not returned. It could otherwise be returned
    /// after a later SIGCONT.
    pub(crate) fn forget_stop(&self) {
        self.stop.store(false, Ordering::Relaxed);
    }

    /// Whether [`next`](Self::next) has returned this signal.
    pub(crate) fn has_received(&self, signal: Signal) -> bool {
        self.returned & bit(signal) != 0
    }
}

/// Which processes a signal is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// This process.
    Myself,
    /// This process and the rest of its process group.
    Group,
}

/// Ends this process by the default action of a signal, so that a waiting shell sees that the
/// signal ended it. Returns only if this process has the id 1, because the default action of a
/// signal cannot end that process.
///
/// An exit code would not do: if a program handles an interrupt and exits, a shell goes on with the
/// next line of its script.
pub(crate) fn die_of(signal: Signal, target: Target) {
    if getpid().is_init() {
        return;
    }
    if signal == Signal::QUIT {
        // No core dump of leasectl: only the command's is of use.
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    }
    if target == Target::Group {
        // This process has a handler for the signal, so it survives this call.
        let _ = kill_current_process_group(signal);
    }
    let _ = emulate_default_handler(signal.as_raw());
}

/// A signal's bit in a mask.
fn bit(signal: Signal) -> u64 {
    1 << (signal.as_raw() - 1)
}

/// The signals that this process was started to ignore, one bit each (`SigIgn` in proc(5)). 0 on a
/// system without that file.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
