//! Whose the terminal is. A process group that is not in the foreground gets no keys, and is stopped when it asks for some.
//!
//! Giving the terminal away is for whoever is in the foreground, and so is taking it back, unless one ignores SIGTTOU. So
//! a helper takes it back: this program in another role, started within the command's group.

use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};
use std::os::unix::process::CommandExt;
use std::process::{ExitCode, Stdio};

use rustix::process::{Pid, Signal, getpgid, getpgrp, getppid, getsid, kill_current_process_group};
use rustix::termios::{tcgetpgrp, tcsetpgrp};

use crate::guardian::program;

/// The name under which this program takes a terminal back.
pub(crate) const ROLE: &str = "lease-terminal";

/// The controlling terminal.
pub(crate) struct Terminal {
    tty: File,
    /// The group of this process.
    own: Pid,
}

impl Terminal {
    /// `None` if there is none.
    pub(crate) fn open() -> Option<Self> {
        Some(Self { tty: tty().ok()?, own: getpgrp() })
    }

    /// Whether a command should have the terminal before it asks: in a pipeline another may want the keys.
    pub(crate) fn is_for_command() -> bool {
        stdin().is_terminal() && stdout().is_terminal()
    }

    /// Whether this process is in the foreground.
    pub(crate) fn is_ours(&self) -> bool {
        tcgetpgrp(&self.tty).is_ok_and(|foreground| foreground == self.own)
    }

    /// Gives the terminal to a group, if it is ours to give.
    pub(crate) fn give(&self, group: Pid) -> bool {
        self.is_ours() && tcsetpgrp(&self.tty, group).is_ok()
    }

    /// Takes the terminal back from a group, if that has it, and returns whether it had. A process of the group must not
    /// have been waited for yet.
    pub(crate) fn take_back(&self, group: Pid) -> bool {
        if tcgetpgrp(&self.tty) != Ok(group) {
            return false;
        }
        let mut helper = program(ROLE);
        helper.process_group(group.as_raw_nonzero().get());
        helper.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Nobody could be told, and a shell with job control takes it back by itself.
        drop(helper.status());
        true
    }

    /// Stops this process and its whole group, as the key for it would have done, until a shell continues it. Does nothing if
    /// no shell is there to do so.
    pub(crate) fn stop(&self) -> bool {
        let session = |process| getsid(process).ok();
        let has_shell = getppid().is_some() && session(getppid()) == session(None);
        has_shell && kill_current_process_group(Signal::STOP).is_ok()
    }
}

/// Puts the group of the process that started this one in the foreground.
pub(crate) fn main() -> ExitCode {
    let taken = tty().is_ok_and(|tty| getpgid(getppid()).is_ok_and(|group| tcsetpgrp(tty, group).is_ok()));
    if taken { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tty() -> std::io::Result<File> {
    File::options().read(true).write(true).open("/dev/tty")
}
