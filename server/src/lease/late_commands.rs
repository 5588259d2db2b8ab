//! Histories in which commands arrive late, more than once and in any order.
//!
//! The properties:
//! - A lease id gets at most one token, and a released id never holds or waits again.
//! - A caller that knows of its lease loses it only by its own release, by a revocation, or to a
//!   waiter after the lease and the grace are over.
//! - At the end of a history an id holds or waits only if its caller may still want it.
//!
//! The callers follow docs/semantics.md. They choose an id for each acquisition and mark a repeated
//! call as a repetition. If they gave up an acquire, they mark its release as given up.
//! Releases may arrive at any time. Any other command may be lost, or delayed by up to
//! [`MAX_COMMAND_DELAY`]. No call reaches a daemon later than [`MAX_CALL_DELAY`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::*;

const RULES: Rules = Rules { grace: Duration::from_millis(300), waiter_ttl: Duration::from_millis(900) };
const START: i64 = 1_000_000;
/// How many callers there are, each with an id. The ids of [`Event::Others`] are further ones.
const IDS: u8 = 30;
/// How long a command may be under way to the store, in milliseconds.
const MAX_COMMAND_DELAY: i64 = 10_000;
/// How long a call may be under way to a daemon, in milliseconds.
const MAX_CALL_DELAY: i64 = 30_000;

type Step = fn(Record, &Edit, Timestamp, &Rules) -> Record;
type NewSimulation = fn() -> Simulation;

#[derive(Debug, Clone)]
enum Event {
    /// A caller begins an acquire. The call may reach a daemon later.
    Call(u8),
    /// The call reaches a daemon, which sends a command. A second `Ask` for the same call means
    /// that this daemon or another one sends the command again.
    Ask(u8),
    /// One of the commands under way takes effect.
    Arrive(usize, Answer),
    Touch(u8),
    /// The caller releases its lease, or gives up its acquire.
    Release(u8),
    /// The time that the call may wait is over.
    Cancel(u8),
    /// The daemon finds that the call is not in the queue, and asks again.
    Rejoin(u8),
    Revoke(usize),
    /// This many other ids acquire a lease and release it, one after the other.
    Others(u8),
    /// This many hundreds of unused ids are released.
    Flood(u8),
    /// The clock moves by this many milliseconds.
    Pass(i64),
}

/// Whether the answer to a command reaches the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Delivered,
    Lost,
}

/// What a caller knows of its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Knowledge {
    #[default]
    Idle,
    Asks,
    Waits,
    Holds,
    /// The caller has released the id or was refused.
    Over,
}

#[derive(Default)]
struct Caller {
    state: Knowledge,
    called_at: i64,
    /// How many commands that ask for the id were sent. Only the answer to the latest one counts.
    asks: u32,
    asked_at: i64,
    /// The caller released the id without knowing whether it holds.
    gives_up: bool,
    token: Option<FencingToken>,
    settled: bool,
}

struct Command {
    edit: Edit,
    sent_at: i64,
    /// The caller that the answer is for, and which of its commands this is.
    answers: Option<(u8, u32)>,
}

struct Simulation {
    step: Step,
    /// What a daemon commits before it refuses an id that it has asked for more than once.
    refusal: Option<fn(Edit, LeaseId) -> Edit>,
    /// Whether a daemon asks once more for an id that it wanted to keep out and finds in use.
    asks_again: bool,
    record: Record,
    now: i64,
    callers: HashMap<u8, Caller>,
    under_way: Vec<Command>,
    other_ids: u64,
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

/// Returns the acquisition of a caller, always the same one. Most are shared, so that many callers
/// hold at once.
fn acquisition(number: u8, repeated: bool) -> Arc<Acquisition> {
    Arc::new(Acquisition {
        mode: if number.is_multiple_of(5) { Mode::Exclusive } else { Mode::Shared },
        shared_limit: 1000,
        ttl: Ttl::new(Duration::from_millis(u64::from(number) * 120 + 100)).expect("a time"),
        wait: !number.is_multiple_of(3),
        repeated,
        ..Acquisition::waiting(id(number))
    })
}

impl Simulation {
    fn new(step: Step) -> Self {
        Self {
            step,
            refusal: Some(Edit::keep_out),
            asks_again: true,
            record: Record::vacant(Key::try_from("key").expect("a key")),
            now: START,
            callers: HashMap::new(),
            under_way: Vec::new(),
            other_ids: 0,
        }
    }

    fn caller(&mut self, who: u8) -> &mut Caller {
        self.callers.entry(who).or_default()
    }

    fn send(&mut self, edit: Edit, answers: Option<(u8, u32)>) {
        self.under_way.push(Command { edit, sent_at: self.now, answers });
    }

    /// Sends a command that asks for the id. All but the first one count as repeated.
    fn ask(&mut self, who: u8) {
        let now = self.now;
        let caller = self.caller(who);
        caller.asks += 1;
        caller.asked_at = now;
        let (number, repeated) = (caller.asks, caller.asks > 1);
        self.send(Edit::default().enqueue(acquisition(who, repeated)), Some((who, number)));
    }

    fn apply(&mut self, edit: &Edit) -> Result<(), TestCaseError> {
        let after = (self.step)(self.record.clone(), edit, Timestamp(self.now), &RULES);
        let before = std::mem::replace(&mut self.record, after);
        let held = |record: &Record, id| record.holders.iter().any(|holder| holder.id == id);
        for (who, _) in self.callers.iter().filter(|(_, caller)| caller.state == Knowledge::Holds) {
            let mut departures = self.record.departures.iter();
            let is_taken_away = |departure: &Departure| {
                departure.id == id(*who) && matches!(departure.reason, Reason::Displaced | Reason::Revoked)
            };
            let lost = held(&before, id(*who)) && !held(&self.record, id(*who));
            prop_assert!(!lost || departures.any(is_taken_away), "{who} loses a lease that it knows of");
        }
        let mut counts = BTreeMap::new();
        for id in self.record.holders.iter().map(|holder| holder.id).chain(self.waiting()) {
            *counts.entry(id).or_insert(0) += 1;
        }
        for (who, caller) in &mut self.callers {
            let id = id(*who);
            let count = counts.get(&id).copied().unwrap_or(0);
            prop_assert!(count <= 1, "{who} holds or waits twice");
            caller.settled |= edit.released().contains(&id);
            prop_assert!(!caller.settled || count == 0, "{who} was released, and holds or waits");
            if let Some(holder) = self.record.holders.iter().find(|holder| holder.id == id) {
                let token = *caller.token.get_or_insert(holder.token);
                prop_assert_eq!(token, holder.token, "{} has a second token", who);
            }
        }
        Ok(())
    }

    fn waiting(&self) -> impl Iterator<Item = LeaseId> {
        self.record.waiters.iter().map(|waiter| waiter.acquisition.id)
    }

    fn play(mut self, events: &[Event]) -> Result<(), TestCaseError> {
        events.iter().try_for_each(|event| self.apply_event(event))?;
        self.end()
    }

    fn apply_event(&mut self, event: &Event) -> Result<(), TestCaseError> {
        let now = self.now;
        match *event {
            Event::Call(who) => {
                let caller = self.caller(who);
                if caller.state == Knowledge::Idle {
                    (caller.state, caller.called_at) = (Knowledge::Asks, now);
                }
            }
            Event::Ask(who) => {
                let Caller { state, called_at, asks, .. } = *self.caller(who);
                // The first call of a caller that gave up may still arrive. A caller that gave up
                // repeats no call.
                let may_arrive =
                    state == Knowledge::Asks || (state == Knowledge::Over && asks == 0 && called_at > 0);
                if may_arrive && now <= called_at + MAX_CALL_DELAY {
                    self.ask(who);
                }
            }
            Event::Arrive(which, answer) if !self.under_way.is_empty() => {
                let Command { edit, sent_at, answers } = self.under_way.remove(which % self.under_way.len());
                // A release is sent until it is answered, so it may arrive at any time.
                if answers.is_none() || now <= sent_at + MAX_COMMAND_DELAY {
                    self.apply(&edit)?;
                    if let Some((who, number)) = answers.filter(|_| answer == Answer::Delivered) {
                        self.receive_answer(who, number, !edit.kept_out().is_empty());
                    }
                }
            }
            Event::Touch(who) => {
                if matches!(self.caller(who).state, Knowledge::Holds | Knowledge::Waits) {
                    let asks = self.caller(who).asks;
                    self.send(Edit::default().touch(id(who)), Some((who, asks)));
                }
            }
            Event::Release(who) => {
                // A release that is repeated says the same as the first one.
                let caller = self.caller(who);
                caller.gives_up |= matches!(caller.state, Knowledge::Asks | Knowledge::Waits);
                if caller.state != Knowledge::Idle {
                    caller.state = Knowledge::Over;
                    let edit = Edit::default();
                    let edit = if caller.gives_up { edit.give_up(id(who)) } else { edit.release(id(who)) };
                    self.send(edit, None);
                }
            }
            Event::Cancel(who) => {
                // The lease may be granted just before, and then the answer says so.
                let Caller { state, asks, .. } = *self.caller(who);
                if state == Knowledge::Waits {
                    self.send(Edit::default().cancel(id(who)), Some((who, asks)));
                }
            }
            Event::Rejoin(who) => {
                if self.caller(who).state == Knowledge::Waits {
                    self.ask(who);
                }
            }
            Event::Revoke(which) => {
                if let Some(holder) = self.record.holders.get(which) {
                    let revoke = Edit::default().revoke(holder.id);
                    self.apply(&revoke)?;
                }
            }
            Event::Others(count) => {
                for _ in 0..count {
                    let id = self.other_id();
                    let asked =
                        Acquisition { mode: Mode::Shared, shared_limit: 1000, ..Acquisition::waiting(id) };
                    self.apply(&Edit::default().enqueue(Arc::new(asked)))?;
                    self.apply(&Edit::default().release(id))?;
                }
            }
            Event::Flood(hundreds) => {
                for _ in 0..hundreds {
                    let release = (0..100).fold(Edit::default(), |edit, _| edit.release(self.other_id()));
                    self.apply(&release)?;
                }
            }
            Event::Pass(millis) => self.now += millis,
            Event::Arrive(..) => {}
        }
        Ok(())
    }

    /// Returns an id that no caller has.
    fn other_id(&mut self) -> LeaseId {
        self.other_ids += 1;
        let mut bytes = [0xff; 16];
        bytes[..8].copy_from_slice(&self.other_ids.to_be_bytes());
        LeaseId::from(bytes)
    }

    /// Answers the caller from the record. If an id that the daemon wanted to keep out holds, the
    /// daemon asks again instead. Before it refuses, it may commit an edit.
    fn receive_answer(&mut self, who: u8, number: u32, was_kept_out: bool) {
        let snapshot = Snapshot { record: self.record.clone(), now: Timestamp(self.now) };
        let asks_again = was_kept_out && self.asks_again;
        let caller = self.caller(who);
        if caller.asks == number && matches!(caller.state, Knowledge::Asks | Knowledge::Waits) {
            match snapshot.standing(id(who)) {
                Standing::Holder(_) if asks_again => self.ask(who),
                Standing::Holder(_) => caller.state = Knowledge::Holds,
                Standing::Waiter(_) => caller.state = Knowledge::Waits,
                Standing::Departed(_) => caller.state = Knowledge::Over,
                Standing::Unknown => self.refuse(who),
            }
        }
    }

    /// Refuses the call. If earlier commands for the id may still arrive, the daemon first commits
    /// an edit, and answers the caller after that.
    fn refuse(&mut self, who: u8) {
        let (now, refusal) = (self.now, self.refusal);
        let caller = self.caller(who);
        match refusal {
            Some(refusal) if caller.asks > 1 && now <= caller.asked_at + MAX_COMMAND_DELAY => {
                let answered_to = (who, caller.asks);
                self.send(refusal(Edit::default(), id(who)), Some(answered_to));
            }
            _ => caller.state = Knowledge::Over,
        }
    }

    /// Applies all commands that can still take effect, and the releases last, since they are sent
    /// until they are answered. Then checks that no id of a caller that is done holds or waits.
    fn end(&mut self) -> Result<(), TestCaseError> {
        let under_way = std::mem::take(&mut self.under_way);
        let (asks, others): (Vec<_>, Vec<_>) =
            under_way.into_iter().partition(|command| command.answers.is_some());
        for Command { edit, sent_at, .. } in asks {
            if self.now <= sent_at + MAX_COMMAND_DELAY {
                self.apply(&edit)?;
            }
        }
        for Command { edit, .. } in others {
            self.apply(&edit)?;
        }
        let held = |id| self.record.holders.iter().any(|holder| holder.id == id);
        let waits = |id| self.waiting().any(|waiting| waiting == id);
        for (who, Caller { state, .. }) in &self.callers {
            prop_assert!(
                *state != Knowledge::Over || !(held(id(*who)) || waits(id(*who))),
                "{who} is done, and holds or waits"
            );
        }
        Ok(())
    }
}

/// Generates callers: mostly one of four, so that these have long histories.
fn many() -> BoxedStrategy<u8> {
    prop_oneof![3 => 0_u8..4, 1 => 0..IDS].boxed()
}

/// Generates one of two callers that exclude each other and do not wait: one is refused while the
/// other holds.
fn rivals() -> BoxedStrategy<u8> {
    prop::sample::select(vec![0, 3]).boxed()
}

fn events(who: BoxedStrategy<u8>) -> impl Strategy<Value = Vec<Event>> {
    let who = move || who.clone();
    let arrive = |(which, is_delivered): (usize, bool)| {
        let answer = if is_delivered { Answer::Delivered } else { Answer::Lost };
        Event::Arrive(which, answer)
    };
    let event = prop_oneof![
        3 => who().prop_map(Event::Call),
        6 => who().prop_map(Event::Ask),
        8 => (any::<usize>(), any::<bool>()).prop_map(arrive),
        1 => who().prop_map(Event::Touch),
        3 => who().prop_map(Event::Release),
        1 => who().prop_map(Event::Cancel),
        1 => who().prop_map(Event::Rejoin),
        1 => (0_usize..3).prop_map(Event::Revoke),
        2 => (1_u8..12).prop_map(Event::Others),
        2 => prop_oneof![3 => 0_i64..1000, 1 => 1000_i64..9000].prop_map(Event::Pass),
    ];
    prop::collection::vec(event, 1..80)
}

fn play(events: &[Event], step: Step) -> Result<(), TestCaseError> {
    Simulation::new(step).play(events)
}

/// Plays random histories until one violates a property.
fn find_fault(runner: &mut TestRunner, who: BoxedStrategy<u8>, simulation: NewSimulation) -> Option<String> {
    match runner.run(&events(who), |events| simulation().play(&events)) {
        Ok(()) => None,
        Err(TestError::Fail(why, events)) => Some(format!("{why}\n{events:#?}")),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

#[test]
fn an_id_has_at_most_one_token_and_holds_or_waits_at_most_once_until_it_is_released() {
    let cases = std::env::var("LEASED_LATE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    for who in [many(), rivals()] {
        if let Some(fault) = find_fault(&mut TestRunner::new(config.clone()), who, || Simulation::new(step)) {
            panic!("{fault}");
        }
    }
}

/// The histories are the same in each run, so the faults are always found.
#[test]
fn random_histories_find_the_faults_of_mutants() {
    let mutants: [(&str, BoxedStrategy<u8>, NewSimulation); 3] = [
        ("departures are forgotten", many(), || {
            Simulation::new(|mut record, edit, now, rules| {
                record.departures.clear();
                step(record, edit, now, rules)
            })
        }),
        ("a release of an unknown id settles nothing", many(), || {
            Simulation::new(|record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                after.departures.retain(|departure| departure.reason != Reason::Settled);
                after
            })
        }),
        ("a refused id is released instead of kept out", rivals(), || Simulation {
            refusal: Some(Edit::give_up),
            ..Simulation::new(step)
        }),
    ];
    for (how, who, mutant) in mutants {
        let config =
            Config { cases: 20_000, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        assert!(find_fault(&mut TestRunner::new_with_rng(config, rng), who, mutant).is_some(), "{how}");
    }
}

/// For each part of the rules, a history in which, without that part, an id holds or waits after
/// its end.
#[test]
fn each_part_of_the_rules_is_needed() {
    use Answer::{Delivered, Lost};
    use Event::{Arrive, Ask, Call, Flood, Others, Pass, Release, Revoke};
    const WHO: u8 = 1;
    // The first of two commands is granted the lease. The second one arrives after many other ids
    // have held and ended.
    let twice = |between: &[Event]| {
        let begin = [Call(WHO), Ask(WHO), Ask(WHO), Arrive(0, Lost)];
        [&begin, between, &[Others(10), Arrive(0, Lost)]].concat()
    };
    let given_up = twice(&[Release(WHO), Arrive(1, Lost)]);
    let asked_again = twice(&[Ask(WHO), Arrive(1, Delivered), Release(WHO), Arrive(1, Lost)]);
    let released_first = vec![Call(WHO), Release(WHO), Arrive(0, Lost), Ask(WHO), Arrive(0, Lost)];
    let mutants: [(&str, Vec<Event>, Step); 8] = [
        ("departures are remembered", given_up.clone(), |mut record, edit, now, rules| {
            record.departures.clear();
            step(record, edit, now, rules)
        }),
        ("some departures are remembered for long", given_up.clone(), |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            after.departures.truncate(REMEMBERED_DEPARTURES);
            after
        }),
        ("departures of ids that were given up are lasting", given_up, |record, edit, now, rules| {
            let plain = edit.released().iter().fold(Edit::default(), |edit, id| edit.release(*id));
            step(record, if edit.released().is_empty() { edit } else { &plain }, now, rules)
        }),
        (
            "departures of ids that were asked for more than once are lasting",
            asked_again,
            |record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                after.holders.iter_mut().for_each(|holder| holder.repeated = false);
                after
            },
        ),
        ("departures of revoked leases are lasting", twice(&[Revoke(0)]), |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            for departure in &mut after.departures {
                departure.lasting &= departure.reason != Reason::Revoked;
            }
            after
        }),
        (
            "departures of revoked leases are lasting even when unused ids are released",
            twice(&[Flood(11), Revoke(0)]),
            |mut record, edit, now, rules| {
                // With another reason these departures may use the whole capacity of lasting ones.
                for departure in
                    record.departures.iter_mut().filter(|departure| departure.reason == Reason::Settled)
                {
                    departure.reason = Reason::Withdrawn;
                }
                step(record, edit, now, rules)
            },
        ),
        ("departures of displaced leases are lasting", twice(&[Pass(1000)]), |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            for departure in &mut after.departures {
                departure.lasting &= departure.reason != Reason::Displaced;
            }
            after
        }),
        ("a release of an unknown id is remembered", released_first, |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            after.departures.retain(|departure| departure.reason != Reason::Settled);
            after
        }),
    ];
    for (rule, history, mutant) in mutants {
        assert!(play(&history, step).is_ok(), "{rule}");
        assert!(play(&history, mutant).is_err(), "no property needs this rule: {rule}");
    }

    const HOLDER: u8 = 0;
    const TRY: u8 = 3;
    let holds = [Call(HOLDER), Ask(HOLDER), Arrive(0, Delivered)];
    let refused = [Call(TRY), Ask(TRY), Ask(TRY), Arrive(1, Delivered), Release(HOLDER), Arrive(1, Lost)];
    let history = [&holds[..], &refused].concat();
    assert!(play(&history, step).is_ok());
    let without_keep_out = Simulation { refusal: None, ..Simulation::new(step) };
    assert!(without_keep_out.play(&history).is_err(), "no property needs that refused ids are kept out");

    // The first daemon has not refused yet. The caller asks again at another daemon and is granted
    // the lease. Then the command arrives that precedes the refusal.
    let refused = [Call(TRY), Ask(TRY), Ask(TRY), Arrive(1, Delivered)];
    let granted = [Ask(TRY), Release(HOLDER), Arrive(3, Lost), Arrive(2, Delivered)];
    let history = [&holds[..], &refused, &granted, &[Arrive(1, Lost)]].concat();
    assert!(play(&history, step).is_ok());
    let with_release = Simulation { refusal: Some(Edit::give_up), ..Simulation::new(step) };
    assert!(with_release.play(&history).is_err(), "no property needs that an id in use is left alone");

    // Of three commands the last is refused, and then the first is granted the lease. The second
    // one arrives after the lease has ended.
    let refused =
        [Call(TRY), Ask(TRY), Ask(TRY), Ask(TRY), Arrive(2, Delivered), Release(HOLDER), Arrive(3, Lost)];
    let granted = [Arrive(0, Lost), Arrive(1, Delivered)];
    let over = [Release(TRY), Arrive(1, Lost), Others(10), Arrive(0, Lost)];
    let history = [&holds[..], &refused, &granted, &over].concat();
    assert!(play(&history, step).is_ok());
    let without_asking_again = Simulation { asks_again: false, ..Simulation::new(step) };
    assert!(
        without_asking_again.play(&history).is_err(),
        "no property needs that an id which could not be kept out is asked for again"
    );
    let history = [&holds[..], &refused, &granted, &[Arrive(1, Delivered)], &over].concat();
    assert!(play(&history, step).is_ok());
}
