//! `run`: runs a command for as long as a lease is held.
//!
//! ```text
//!            granted            the command ends
//!  waiting ──────────► running ──────────────────► release the lease, exit as the command did
//!                        │  │ lost: SIGKILL
//!            in jeopardy │  └──────────────────┐
//!               SIGTERM  ▼                     ▼
//!                      ending ─────────────► over: exit 73
//!                      the command ends, or gets SIGKILL once the lease is lost or near its end
//! ```

use std::ffi::OsString;
use std::time::Duration;

use leased_client::{Client, Error, Lease, State};
use rustix::process::Signal;
use tokio::signal::unix::{Signal as Notices, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::args::AcquireArgs;
use crate::failure::Failure;
use crate::job::{Event, Exit, Job};
use crate::output::complain;
use crate::signals::{ENDING, OTHER, Signals, Target, die_of};
use crate::times::{Times, after, until};
use crate::wait;

/// The longest timer. Timers stop while the machine is suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long to try to release a lease that no daemon has confirmed in time.
const LAST_RELEASE: Duration = Duration::from_secs(1);
/// If one signal ends both the command and its guardian: how long after one of them the other may
/// be seen to end.
const TOGETHER: Duration = Duration::from_secs(1);

/// A command that runs under a lease.
struct Running {
    lease: Lease,
    times: Times,
    job: Job,
    signals: Signals,
    /// Receives SIGCHLD: a child has ended or was stopped.
    children: Notices,
}

/// How the run of a command ended.
enum End {
    /// The command ended before its deadline.
    Done(Exit),
    /// The lease could no longer be relied on.
    Lost(State),
    /// The guardian was killed.
    Unguarded,
}

/// Whether a signal has already told leasectl and the command to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToldToEnd {
    No,
    Yes,
}

/// Waits for a lease, runs the command while it is held, and returns the command's exit code.
pub(crate) async fn run(client: &Client, args: AcquireArgs, command: &[OsString]) -> Result<u8, Failure> {
    if command.first().is_some_and(|program| program.is_empty()) {
        return Err(Failure::Usage("the command is empty; name it after `--`".to_owned()));
    }
    let times = Times::of(args.ttl);
    let mut signals = Signals::new(ENDING)?;
    let lease = wait::for_lease(client, args, &mut signals).await?;
    let mut running = match Running::start(lease, times, signals, command) {
        Ok(running) => running,
        Err(not_started) => {
            let (lease, mut signals, failure) = *not_started;
            release(lease, &mut signals, ToldToEnd::No).await?;
            return Err(failure);
        }
    };
    let end = match running.supervise().await? {
        // The lease may have been lost just before the command ended, and not been noticed yet.
        End::Done(_) if !running.lease.is_held() => End::Lost(running.lease.state().current()),
        end => end,
    };
    match end {
        End::Done(exit) => {
            let had_terminal = running.job.leave();
            // A shell around leasectl ends its script only if the same signal ends leasectl.
            let target = match exit.by_key() {
                // The terminal sent the key's signal only to the command's group.
                Some(signal) if had_terminal && running.group_received(signal).await => {
                    Some((signal, Target::Group))
                }
                Some(signal) if running.signals.has_received(signal) => Some((signal, Target::Myself)),
                _ => None,
            };
            let is_told =
                target.is_some() || exit.signal().is_some_and(|signal| running.signals.has_received(signal));
            let told = if is_told { ToldToEnd::Yes } else { ToldToEnd::No };
            release(running.lease, &mut running.signals, told).await?;
            if let Some((signal, target)) = target {
                die_of(signal, target);
            }
            Ok(exit.code())
        }
        End::Lost(state) => Err(running.lost(state).await),
        End::Unguarded => {
            running.job.leave();
            release(running.lease, &mut running.signals, ToldToEnd::No).await?;
            Err(Failure::Other(
                "the command was killed, because its guardian (the process lease-guard) was killed"
                    .to_owned(),
            ))
        }
    }
}

impl Running {
    fn start(
        lease: Lease,
        times: Times,
        signals: Signals,
        command: &[OsString],
    ) -> Result<Self, Box<(Lease, Signals, Failure)>> {
        let started = || -> Result<(Job, Notices), Failure> {
            signals.add(OTHER)?;
            let children = signal(SignalKind::child())?;
            let environment =
                [("LEASED_KEY", lease.key().to_owned()), ("LEASED_TOKEN", lease.token().to_string())];
            Ok((Job::start(command, environment, kill_at(&lease, times))?, children))
        };
        match started() {
            Ok((job, children)) => Ok(Self { lease, times, job, signals, children }),
            Err(failure) => Err(Box::new((lease, signals, failure))),
        }
    }

    /// Waits until the command has ended, and ends it once the lease cannot be relied on.
    async fn supervise(&mut self) -> Result<End, Failure> {
        let mut ticks = interval(self.times.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            match self.poll()? {
                Some(End::Unguarded) => return self.unguarded().await,
                Some(end) => return Ok(end),
                None => {}
            }
            tokio::select! {
                biased;
                _ = self.children.recv() => {}
                signal = self.signals.next() => self.pass_on(signal),
                state = self.lease.lost() => return self.end(state).await,
                _ = ticks.tick() => {
                    // In jeopardy the last deadline stays: `kill_at` would move on with the clock.
                    if self.lease.is_held() {
                        self.job.until(kill_at(&self.lease, self.times));
                    }
                }
            }
        }
    }

    /// Ends the command because the lease cannot be relied on, even if a daemon confirms the lease
    /// meanwhile. Returns once the command has ended.
    async fn end(&mut self, state: State) -> Result<End, Failure> {
        // Not after the deadline: SIGCONT would let a stopped command run for an instant.
        if state == State::Jeopardy && !until(self.job.deadline()).is_zero() {
            self.job.signal(Signal::TERM);
            // A stopped command would not notice SIGTERM.
            self.job.signal(Signal::CONT);
            loop {
                if self.poll()?.is_some() {
                    return Ok(End::Lost(state));
                }
                let left = until(self.job.deadline());
                if left.is_zero() {
                    break;
                }
                tokio::select! {
                    biased;
                    _ = self.children.recv() => {}
                    _ = self.lease.lost_for_good() => break,
                    signal = self.signals.next() => self.pass_on(signal),
                    () = sleep(left.min(LONGEST_SLEEP)) => {}
                }
            }
        }
        self.job.signal(Signal::KILL);
        self.ended().await?;
        Ok(End::Lost(self.lease.state().current()))
    }

    /// Ends the command because its guardian is gone.
    ///
    /// One signal may have ended both, as a command's own `kill -9 0` does. The command may then be
    /// seen to end after the guardian, and counts as having ended on its own. So this waits for
    /// [`TOGETHER`] before it kills the command.
    async fn unguarded(&mut self) -> Result<End, Failure> {
        let mut too_long = std::pin::pin!(sleep(TOGETHER.min(until(self.job.deadline()))));
        loop {
            if let Some(end @ (End::Done(_) | End::Lost(_))) = self.poll()? {
                return Ok(end);
            }
            tokio::select! {
                biased;
                _ = self.children.recv() => {}
                _ = self.lease.lost() => break,
                () = &mut too_long => break,
            }
        }
        self.job.signal(Signal::KILL);
        self.ended().await?;
        Ok(End::Unguarded)
    }

    /// Waits until the command has ended, with or without a guardian.
    async fn ended(&mut self) -> Result<End, Failure> {
        loop {
            match self.poll()? {
                Some(end @ (End::Done(_) | End::Lost(_))) => return Ok(end),
                Some(End::Unguarded) | None => self.children.recv().await,
            };
        }
    }

    /// Handles the events of the command. Returns how the command ended, or `None` if it still
    /// runs.
    fn poll(&mut self) -> Result<Option<End>, Failure> {
        while let Some(event) = self.job.poll()? {
            match event {
                // Past the deadline the guardian has killed the command. This process was held up.
                Event::Ended(_) if until(self.job.deadline()).is_zero() => {
                    return Ok(Some(End::Lost(State::Jeopardy)));
                }
                Event::Ended(exit) => return Ok(Some(End::Done(exit))),
                Event::Unguarded if until(self.job.deadline()).is_zero() => {
                    return Ok(Some(End::Lost(State::Jeopardy)));
                }
                Event::Unguarded => return Ok(Some(End::Unguarded)),
                Event::Stopped(signal) => {
                    self.job.stopped(signal);
                    // `stopped` may have sent SIGTSTP to this process's own group, and this process
                    // has received it.
                    self.signals.forget_stop();
                }
            }
        }
        Ok(None)
    }

    /// Passes a signal on to the command.
    fn pass_on(&self, signal: Signal) {
        match signal {
            // Only while the lease is held. If it has lapsed during the stop, `end` signals the
            // command.
            Signal::CONT if self.lease.is_held() => self.job.resume(),
            Signal::CONT => {}
            signal => self.job.signal(signal),
        }
    }

    /// Whether the signal that ended the command was sent to its whole group, as a terminal does
    /// for a key. Otherwise the command has sent the signal to itself. The dismissed guardian is in
    /// the group, and reports which signals it received.
    async fn group_received(&mut self, signal: Signal) -> bool {
        let mut too_long = std::pin::pin!(sleep(TOGETHER));
        loop {
            if let Some(is_received) = self.job.group_received(signal) {
                return is_received;
            }
            tokio::select! {
                biased;
                _ = self.children.recv() => {}
                () = &mut too_long => return true,
            }
        }
    }

    /// Ends what is left of the command's group, and returns the failure to report.
    async fn lost(mut self, state: State) -> Failure {
        self.job.clear();
        while !self.job.is_clear() {
            tokio::select! {
                biased;
                _ = self.children.recv() => {}
                _ = self.lease.lost_for_good() => break,
                () = sleep(until(self.job.deadline())), if !until(self.job.deadline()).is_zero() => {}
            }
            if until(self.job.deadline()).is_zero() {
                break;
            }
        }
        self.job.signal(Signal::KILL);
        let key = crate::table::plain(self.lease.key());
        match state {
            State::Lost(loss) => Failure::Lost(format!(
                "the lease of {key} was lost while the command ran ({loss}), and the command was killed; \
                 `leasectl get` shows who holds the key now"
            )),
            // Held, in jeopardy, or a state of a later version.
            _ => {
                // If a daemon answers again, waiters need not wait until the TTL ends.
                let _ = timeout(LAST_RELEASE, self.lease.release()).await;
                Failure::Lost(format!(
                    "no daemon confirmed the lease of {key} in time, and the command was ended before another holder \
                     could take the key"
                ))
            }
        }
    }
}

/// When the command must be killed unless the lease is confirmed again: [`Times::reserve`] before
/// another holder could take the key.
fn kill_at(lease: &Lease, times: Times) -> u64 {
    after(lease.remaining() + times.margin.saturating_sub(times.reserve))
}

/// Releases the lease after the command has ended, or reports that it could not be released. A
/// second signal interrupts the release, and the lease then lapses. If `told` is
/// [`ToldToEnd::Yes`], the next signal counts as the second.
async fn release(lease: Lease, signals: &mut Signals, told: ToldToEnd) -> Result<(), Failure> {
    let (key, ttl) = (crate::table::plain(lease.key()), crate::table::duration(lease.ttl()));
    let released = tokio::select! {
        biased;
        released = lease.release() => released,
        signal = signals.ending(if told == ToldToEnd::Yes { 1 } else { 2 }) => return Err(Failure::Signal(signal)),
    };
    match released {
        Ok(()) => Ok(()),
        Err(Error::Lost(loss)) => Err(Failure::Lost(format!(
            "the lease of {key} was lost before it was released ({loss}); the command's last steps may have run at the \
             same time as another holder's"
        ))),
        Err(error) => {
            complain(&format!("the lease of {key} could not be released ({error}); it lapses within {ttl}"));
            Ok(())
        }
    }
}
