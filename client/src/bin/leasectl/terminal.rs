//! The controlling terminal: which process group gets its keys, and stopping as a job of a shell.
//!
//! A process group that is not in the foreground gets no keys, and is stopped when it reads the terminal.

use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};

use nix::sys::signal::{SigSet, Signal as Blocked};
use rustix::process::{Pid, Signal, getpid, getppid, kill_current_process_group, kill_process};
use rustix::termios::{tcgetpgrp, tcsetpgrp};

use crate::processes::{self, Process};

/// The controlling terminal.
pub(crate) struct Terminal {
    tty: File,
    /// The group of this process. `None` if a PID namespace hides its number: then the terminal could be given away,
    /// but never taken back.
    own: Option<Pid>,
}

impl Terminal {
    /// `None` if there is none.
    pub(crate) fn open() -> Option<Self> {
        let tty = File::options().read(true).write(true).open("/dev/tty").ok()?;
        Some(Self { tty, own: processes::group_of(None) })
    }

    /// Whether a command should have the terminal before it asks: in a pipeline another may want the keys.
    pub(crate) fn is_for_command() -> bool {
        stdin().is_terminal() && stdout().is_terminal()
    }

    /// Whether this process is in the foreground.
    pub(crate) fn is_ours(&self) -> bool {
        self.own.is_some() && self.foreground() == self.own
    }

    /// Gives the terminal to a group, if it is ours to give.
    pub(crate) fn give(&self, group: Pid) -> bool {
        self.is_ours() && tcsetpgrp(&self.tty, group).is_ok()
    }

    /// Takes the terminal back from a group, if that has it, and returns whether it had.
    pub(crate) fn take_back(&self, group: Pid) -> bool {
        let Some(own) = self.own.filter(|_| self.foreground() == Some(group)) else { return false };
        // A process that is not in the foreground and changes who is gets SIGTTOU, unless the thread blocks that.
        let mut change = SigSet::empty();
        change.add(Blocked::SIGTTOU);
        let is_blocked = change.thread_block().is_ok();
        // Fails if the terminal is gone, which whoever reads it next will see.
        let _ = tcsetpgrp(&self.tty, own);
        if is_blocked {
            let _ = change.thread_unblock();
        }
        true
    }

    /// Stops this process and its process group as the stop signal of the command would have, until a shell continues
    /// them. Returns false, and does nothing, if no shell is there to do so: the system, too, ignores the stop signals of
    /// the terminal in an orphaned process group.
    pub(crate) fn stop(&self, signal: Signal) -> bool {
        if is_orphaned() {
            return false;
        }
        if [Signal::TTIN, Signal::TTOU].contains(&signal) {
            // Programs that lend the terminal, such as timeout(1), ignore these. This process is stopped by them, and a
            // leasectl around this one learns that the terminal is wanted.
            return kill_current_process_group(signal).is_ok();
        }
        // Never SIGSTOP, which would also stop the guardian of a leasectl around this one. This process has a handler.
        let _ = kill_current_process_group(Signal::TSTP);
        kill_process(getpid(), Signal::STOP).is_ok()
    }

    fn foreground(&self) -> Option<Pid> {
        tcgetpgrp(&self.tty).ok()
    }
}

/// Whether the process group of this process is orphaned: no member has a parent in another group of the session, which
/// could notice that the group is stopped, and continue it.
fn is_orphaned() -> bool {
    let Some(own) = Process::read(getpid()) else {
        // No /proc here. A parent is a shell, or knows one.
        return processes::session_of(getppid()) != processes::session_of(None);
    };
    let has_shell = |member: &Process| {
        let parent = member.parent.and_then(Process::read);
        parent.is_some_and(|parent| parent.session == own.session && parent.group != own.group)
    };
    !Process::all().filter(|process| process.group == own.group).any(|member| has_shell(&member))
}
