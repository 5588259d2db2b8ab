//! The controlling terminal: passes it between process groups, and stops leasectl as a job of a
//! shell.
//!
//! A process group that is not in the foreground gets no keys, and is stopped when it reads the
//! terminal.

use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};

use nix::sys::signal::{SigSet, Signal as Blocked};
use rustix::process::{Pid, Signal, getpid, getppid, kill_current_process_group, kill_process};
use rustix::termios::{tcgetpgrp, tcsetpgrp};

use crate::processes::{self, Process};

/// The controlling terminal.
pub(crate) struct Terminal {
    tty: File,
    /// The group of this process. `None` if a PID namespace hides its number: leasectl could then
    /// give the terminal away, but never take it back.
    own: Option<Pid>,
}

impl Terminal {
    /// Opens the controlling terminal. `None` if there is none.
    pub(crate) fn open() -> Option<Self> {
        let tty = File::options().read(true).write(true).open("/dev/tty").ok()?;
        Some(Self { tty, own: processes::group_of(None) })
    }

    /// Whether a command gets the terminal at its start. In a pipeline another process may need the
    /// keyboard, so the command has to ask for it.
    pub(crate) fn is_for_command() -> bool {
        stdin().is_terminal() && stdout().is_terminal()
    }

    /// Whether this process is in the foreground.
    pub(crate) fn is_ours(&self) -> bool {
        self.own.is_some() && self.foreground() == self.own
    }

    /// Gives the terminal to a group if this process is in the foreground, and returns whether it
    /// did.
    pub(crate) fn give(&self, group: Pid) -> bool {
        self.is_ours() && tcsetpgrp(&self.tty, group).is_ok()
    }

    /// Takes the terminal back from a group, and returns whether the group had it.
    pub(crate) fn take_back(&self, group: Pid) -> bool {
        let Some(own) = self.own.filter(|_| self.foreground() == Some(group)) else { return false };
        // Blocks SIGTTOU, which would stop this process: it sets the foreground group and is not in
        // the foreground itself.
        let mut change = SigSet::empty();
        change.add(Blocked::SIGTTOU);
        let is_blocked = change.thread_block().is_ok();
        // Fails if the terminal is gone, which the next read of it reports.
        let _ = tcsetpgrp(&self.tty, own);
        if is_blocked {
            let _ = change.thread_unblock();
        }
        true
    }

    /// Stops this process and its process group, as the command's stop signal would have done,
    /// until a shell continues them. Without a shell that could continue them, does nothing and
    /// returns false: the system likewise ignores a terminal's stop signals in an orphaned process
    /// group.
    pub(crate) fn stop(&self, signal: Signal) -> bool {
        if is_orphaned() {
            return false;
        }
        if [Signal::TTIN, Signal::TTOU].contains(&signal) {
            // These two signals stop this process, but not programs that ignore them, such as
            // timeout(1). They also show a leasectl around this one that the command needs the
            // terminal.
            return kill_current_process_group(signal).is_ok();
        }
        // The group gets SIGTSTP and never SIGSTOP, which would also stop the guardian of a
        // leasectl around this one. This process has a handler for SIGTSTP, so it stops itself by
        // SIGSTOP.
        let _ = kill_current_process_group(Signal::TSTP);
        kill_process(getpid(), Signal::STOP).is_ok()
    }

    fn foreground(&self) -> Option<Pid> {
        tcgetpgrp(&self.tty).ok()
    }
}

/// Whether the process group of this process is orphaned: no member has a parent in another group
/// of the same session. Only such a parent could notice that the group is stopped, and continue it.
fn is_orphaned() -> bool {
    let Some(own) = Process::read(getpid()) else {
        // Without /proc, a parent in the same session is assumed to be a shell, or the child of
        // one.
        return processes::session_of(getppid()) != processes::session_of(None);
    };
    let has_shell = |member: &Process| {
        let parent = member.parent.and_then(Process::read);
        parent.is_some_and(|parent| parent.session == own.session && parent.group != own.group)
    };
    !Process::all().filter(|process| process.group == own.group).any(|member| has_shell(&member))
}
