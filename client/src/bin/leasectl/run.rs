//! A command that runs for as long as a lease is held.
//!
//! ```text
//!            granted            the command ends
//!  waiting ──────────► running ──────────────────► give the lease back, exit as the command did
//!                        │  │ lost: SIGKILL
//!            in jeopardy │  └──────────────────┐
//!               SIGTERM  ▼                     ▼
//!                      ending ─────────────► over: exit 73
//!                             the command ends, or SIGKILL: the lease is lost, or its end is near
//! ```

use std::ffi::OsString;
use std::time::Duration;

use leased_client::{Client, Error, Lease, State};
use rustix::process::Signal;
use tokio::signal::unix::{Signal as Notices, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::args::Wish;
use crate::failure::Failure;
use crate::job::{Event, Exit, Job};
use crate::output::complain;
use crate::signals::{ENDING, OTHER, Signals, Target, die_of};
use crate::times::{Times, after, until};
use crate::wanted;

/// Timers stand still while the machine is suspended, so none is longer than this.
const NAP: Duration = Duration::from_secs(1);
/// How long to try to give back a lease that no daemon has confirmed for long.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a command may take to end that was killed together with its guardian.
const TOGETHER: Duration = Duration::from_secs(1);

/// A command under its lease.
struct Running {
    lease: Lease,
    times: Times,
    job: Job,
    signals: Signals,
    children: Notices,
}

/// How it came to an end.
enum End {
    /// The command ended under its lease.
    Done(Exit),
    /// The lease could not be relied on any more.
    Lost(State),
    /// The guardian was killed.
    Unguarded,
}

/// Waits for a lease, runs the command while it is held, and returns the command's exit code.
pub(crate) async fn run(client: &Client, wish: Wish, command: &[OsString]) -> Result<u8, Failure> {
    if command.first().is_some_and(|program| program.is_empty()) {
        return Err(Failure::Usage("the command is empty; name it after `--`".to_owned()));
    }
    let times = Times::of(wish.ttl);
    let mut signals = Signals::new(ENDING)?;
    let lease = wanted::lease(client, wish, &mut signals).await?;
    let mut running = match Running::start(lease, times, signals, command) {
        Ok(running) => running,
        Err(not_started) => {
            let (lease, mut signals, failure) = *not_started;
            give_back(lease, &mut signals, false).await?;
            return Err(failure);
        }
    };
    let end = match running.supervise().await? {
        // The lease may have been lost in the very moment: then the command was not under it.
        End::Done(_) if !running.lease.is_held() => End::Lost(running.lease.state().current()),
        end => end,
    };
    match end {
        End::Done(exit) => {
            let had_terminal = running.job.leave();
            // A shell around leasectl ends its script only if leasectl dies of the signal as well.
            let target = match exit.by_key() {
                // The terminal sent the key to the command's group alone.
                Some(signal) if had_terminal && running.group_heard(signal).await => {
                    Some((signal, Target::Group))
                }
                Some(signal) if running.signals.has_come(signal) => Some((signal, Target::Myself)),
                _ => None,
            };
            let is_told =
                target.is_some() || exit.signal().is_some_and(|signal| running.signals.has_come(signal));
            give_back(running.lease, &mut running.signals, is_told).await?;
            if let Some((signal, target)) = target {
                die_of(signal, target);
            }
            Ok(exit.code())
        }
        End::Lost(state) => Err(running.lost(state).await),
        End::Unguarded => {
            running.job.leave();
            give_back(running.lease, &mut running.signals, false).await?;
            Err(Failure::Other("the command was killed, because its guardian had been".to_owned()))
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

    /// Until the command ends, by itself or because it must.
    async fn supervise(&mut self) -> Result<End, Failure> {
        let mut ticks = interval(self.times.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            match self.look()? {
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
                    // Once in jeopardy, what was told last holds.
                    if self.lease.is_held() {
                        self.job.until(kill_at(&self.lease, self.times));
                    }
                }
            }
        }
    }

    /// The lease cannot be relied on: ends the command, and looks on until that has ended. That the lease comes back
    /// meanwhile changes nothing.
    async fn end(&mut self, state: State) -> Result<End, Failure> {
        // Once the deadline has passed one that is stopped must not go on for a moment.
        if state == State::Jeopardy && !until(self.job.deadline()).is_zero() {
            self.job.signal(Signal::TERM);
            // One that is stopped would not notice.
            self.job.signal(Signal::CONT);
            loop {
                if self.look()?.is_some() {
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
                    () = sleep(left.min(NAP)) => {}
                }
            }
        }
        self.job.signal(Signal::KILL);
        self.ended().await?;
        Ok(End::Lost(self.lease.state().current()))
    }

    /// The guardian is gone. A command that was killed with it, as by a `kill -9 0` of its own, may be seen to end later than the
    /// guardian, and has ended by itself all the same. Any other is killed.
    async fn unguarded(&mut self) -> Result<End, Failure> {
        let mut too_long = std::pin::pin!(sleep(TOGETHER.min(until(self.job.deadline()))));
        loop {
            if let Some(end @ (End::Done(_) | End::Lost(_))) = self.look()? {
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

    /// Waits until the command has ended, guarded or not.
    async fn ended(&mut self) -> Result<End, Failure> {
        loop {
            match self.look()? {
                Some(end @ (End::Done(_) | End::Lost(_))) => return Ok(end),
                Some(End::Unguarded) | None => self.children.recv().await,
            };
        }
    }

    /// What has become of the command.
    fn look(&mut self) -> Result<Option<End>, Failure> {
        while let Some(event) = self.job.look()? {
            match event {
                // Not by itself but by the guardian, while this process was held up.
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
                    // This process has sent it to its own group.
                    self.signals.forget_stop();
                }
            }
        }
        Ok(None)
    }

    fn pass_on(&self, signal: Signal) {
        match signal {
            // After a stop: of a lease that has run out meanwhile the command hears by other signals.
            Signal::CONT if self.lease.is_held() => self.job.resume(),
            Signal::CONT => {}
            signal => self.job.signal(signal),
        }
    }

    /// Whether a signal that ended the command was sent to its whole group, as by a key, and so to the guardian, which has
    /// been dismissed. A command may also have sent it to itself.
    async fn group_heard(&mut self, signal: Signal) -> bool {
        let mut too_long = std::pin::pin!(sleep(TOGETHER));
        loop {
            if let Some(heard) = self.job.group_heard(signal) {
                return heard;
            }
            tokio::select! {
                biased;
                _ = self.children.recv() => {}
                () = &mut too_long => return true,
            }
        }
    }

    /// Sees to it that nothing of the command is left, and says what has happened.
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
                 see `leasectl get` for who holds it"
            )),
            // Held, in jeopardy, or something of a later version.
            _ => {
                // Nobody waits for the rest of the TTL if a daemon is there again.
                drop(timeout(FAREWELL, self.lease.release()).await);
                Failure::Lost(format!(
                    "no daemon confirmed the lease of {key} in time, and the command was ended before another could hold it"
                ))
            }
        }
    }
}

/// When the command must be gone, as things stand: `reserve` before another could hold the key.
fn kill_at(lease: &Lease, times: Times) -> u64 {
    after(lease.remaining() + times.margin.saturating_sub(times.reserve))
}

/// Gives the lease back after the command, or says that it could not be. A second signal ends that, and the lease runs out by
/// itself. If `is_told` to end, by the signal that ended the command, the next one is the second.
async fn give_back(lease: Lease, signals: &mut Signals, is_told: bool) -> Result<(), Failure> {
    let (key, ttl) = (crate::table::plain(lease.key()), crate::table::duration(lease.ttl()));
    let released = tokio::select! {
        biased;
        released = lease.release() => released,
        signal = signals.ending(if is_told { 1 } else { 2 }) => return Err(Failure::Signal(signal)),
    };
    match released {
        Ok(()) => Ok(()),
        Err(Error::Lost(loss)) => Err(Failure::Lost(format!(
            "the lease of {key} was lost before it was given back ({loss}); what was done last may have met another holder"
        ))),
        Err(error) => {
            complain(&format!(
                "the lease of {key} could not be given back ({error}); it runs out within {ttl}"
            ));
            Ok(())
        }
    }
}
