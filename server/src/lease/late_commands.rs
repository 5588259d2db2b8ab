//! Commands that come late, more than once and in any order: a lease id yields at most one token, and one that has been
//! released never holds or waits again. Whoever knows that it holds loses the lease by its own release, by a revocation or to
//! the next one in line when its time is over. In the end nobody holds or waits who does not know of it.
//!
//! Callers do what docs/semantics.md asks of them: they choose an id for each acquisition, repeat a call without an answer
//! as a repetition, and release what they gave up as given up. The network and the store do what they like, but no command
//! takes effect later than [`UNDER_WAY`] after it was sent, and no call reaches a daemon later than [`ON_ITS_WAY`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::*;

const RULES: Rules = Rules { grace: Duration::from_millis(300), place: Duration::from_millis(900) };
const START: i64 = 1_000_000;
/// Callers' ids; those of the crowds come on top.
const IDS: u8 = 30;
/// How long a command may be under way to the store.
const UNDER_WAY: i64 = 10_000;
/// How long a call may be under way to the daemon.
const ON_ITS_WAY: i64 = 30_000;

type Step = fn(Record, &Edit, Timestamp, &Rules) -> Record;
type NewWorld = fn() -> World;

#[derive(Debug, Clone)]
enum Event {
    /// A caller asks; the call may reach a daemon later.
    Call(u8),
    /// The call reaches a daemon, which sends a command; or the daemon or another one sends it again.
    Ask(u8),
    /// One of the commands under way takes effect; its answer is lost or heard.
    Arrive(usize, bool),
    Touch(u8),
    /// The caller gives back what it has, or gives up.
    Release(u8),
    /// The call's time is over.
    Cancel(u8),
    /// The daemon has not found the call in line.
    Rejoin(u8),
    Revoke(usize),
    /// So many others come and go.
    Crowd(u8),
    /// So many hundreds of ids that nobody asks for are released.
    Flood(u8),
    Pass(i64),
}

/// What a caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Caller {
    #[default]
    Idle,
    Asks,
    Waits,
    Holds,
    /// It wants the id no more.
    Over,
}

#[derive(Default)]
struct Client {
    state: Caller,
    called_at: i64,
    /// Commands sent that ask for the id; only the latest one's answer is heard.
    asks: u32,
    asked_at: i64,
    /// It released the id without knowing whether it holds.
    gives_up: bool,
    token: Option<FencingToken>,
    settled: bool,
}

struct Command {
    edit: Edit,
    sent_at: i64,
    /// Who hears the answer to which of its commands.
    answers: Option<(u8, u32)>,
}

struct World {
    step: Step,
    /// What a daemon commits before it refuses an id that it asked for more than once.
    refusal: Option<fn(Edit, LeaseId) -> Edit>,
    /// Whether it asks once more for an id that it meant to keep out and finds in use.
    asks_again: bool,
    record: Record,
    now: i64,
    clients: HashMap<u8, Client>,
    under_way: Vec<Command>,
    strangers: u64,
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

/// Of each caller always the same. Most share, so that many hold at once.
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

impl World {
    fn new(step: Step) -> Self {
        Self {
            step,
            refusal: Some(Edit::keep_out),
            asks_again: true,
            record: Record::vacant(Key::try_from("key").expect("a key")),
            now: START,
            clients: HashMap::new(),
            under_way: Vec::new(),
            strangers: 0,
        }
    }

    fn client(&mut self, who: u8) -> &mut Client {
        self.clients.entry(who).or_default()
    }

    fn send(&mut self, edit: Edit, answers: Option<(u8, u32)>) {
        self.under_way.push(Command { edit, sent_at: self.now, answers });
    }

    /// Sends a command that asks for the id. The first is none that was repeated.
    fn ask(&mut self, who: u8, repeated: bool) {
        let now = self.now;
        let client = self.client(who);
        client.asks += 1;
        client.asked_at = now;
        let (number, repeated) = (client.asks, repeated || client.asks > 1);
        self.send(Edit::default().enqueue(acquisition(who, repeated)), Some((who, number)));
    }

    fn apply(&mut self, edit: &Edit) -> Result<(), TestCaseError> {
        let after = (self.step)(self.record.clone(), edit, Timestamp(self.now), &RULES);
        let before = std::mem::replace(&mut self.record, after);
        let held = |record: &Record, id| record.holders.iter().any(|holder| holder.id == id);
        for (who, _) in self.clients.iter().filter(|(_, client)| client.state == Caller::Holds) {
            let mut departures = self.record.departures.iter();
            let taken = |departure: &Departure| {
                departure.id == id(*who) && matches!(departure.reason, Reason::Displaced | Reason::Revoked)
            };
            let lost = held(&before, id(*who)) && !held(&self.record, id(*who));
            prop_assert!(!lost || departures.any(taken), "{who} loses a lease that it knows of");
        }
        let mut places = BTreeMap::new();
        for id in self.record.holders.iter().map(|holder| holder.id).chain(self.waiting()) {
            *places.entry(id).or_insert(0) += 1;
        }
        for (who, client) in &mut self.clients {
            let id = id(*who);
            let places = places.get(&id).copied().unwrap_or(0);
            prop_assert!(places <= 1, "{who} has two places");
            client.settled |= edit.released().contains(&id);
            prop_assert!(!client.settled || places == 0, "{who} was released, and is there");
            if let Some(holder) = self.record.holders.iter().find(|holder| holder.id == id) {
                let token = *client.token.get_or_insert(holder.token);
                prop_assert_eq!(token, holder.token, "{} has a second token", who);
            }
        }
        Ok(())
    }

    fn waiting(&self) -> impl Iterator<Item = LeaseId> {
        self.record.waiters.iter().map(|waiter| waiter.acquisition.id)
    }

    fn play(mut self, events: &[Event]) -> Result<(), TestCaseError> {
        events.iter().try_for_each(|event| self.take(event))?;
        self.end()
    }

    fn take(&mut self, event: &Event) -> Result<(), TestCaseError> {
        let now = self.now;
        match *event {
            Event::Call(who) => {
                let client = self.client(who);
                if client.state == Caller::Idle {
                    (client.state, client.called_at) = (Caller::Asks, now);
                }
            }
            Event::Ask(who) => {
                let Client { state, called_at, asks, .. } = *self.client(who);
                // The call of one that gave up may still come; one that has come is not repeated then.
                let comes = state == Caller::Asks || (state == Caller::Over && asks == 0 && called_at > 0);
                if comes && now <= called_at + ON_ITS_WAY {
                    self.ask(who, false);
                }
            }
            Event::Arrive(which, heard) if !self.under_way.is_empty() => {
                let Command { edit, sent_at, answers } = self.under_way.remove(which % self.under_way.len());
                // What nobody waits for is sent until it is answered.
                if answers.is_none() || now <= sent_at + UNDER_WAY {
                    self.apply(&edit)?;
                    if let Some((who, number)) = answers.filter(|_| heard) {
                        self.hear(who, number, !edit.kept_out().is_empty());
                    }
                }
            }
            Event::Touch(who) => {
                if matches!(self.client(who).state, Caller::Holds | Caller::Waits) {
                    let asks = self.client(who).asks;
                    self.send(Edit::default().touch(id(who)), Some((who, asks)));
                }
            }
            Event::Release(who) => {
                // Again, as after an answer that was lost, it says the same.
                let client = self.client(who);
                client.gives_up |= matches!(client.state, Caller::Asks | Caller::Waits);
                if client.state != Caller::Idle {
                    client.state = Caller::Over;
                    let edit = Edit::default();
                    let edit = if client.gives_up { edit.give_up(id(who)) } else { edit.release(id(who)) };
                    self.send(edit, None);
                }
            }
            Event::Cancel(who) => {
                // Its turn may come at this very moment, which the answer tells.
                let Client { state, asks, .. } = *self.client(who);
                if state == Caller::Waits {
                    self.send(Edit::default().cancel(id(who)), Some((who, asks)));
                }
            }
            Event::Rejoin(who) => {
                if self.client(who).state == Caller::Waits {
                    self.ask(who, true);
                }
            }
            Event::Revoke(which) => {
                if let Some(holder) = self.record.holders.get(which) {
                    let revoke = Edit::default().revoke(holder.id);
                    self.apply(&revoke)?;
                }
            }
            Event::Crowd(count) => {
                for _ in 0..count {
                    let id = self.stranger();
                    let asked =
                        Acquisition { mode: Mode::Shared, shared_limit: 1000, ..Acquisition::waiting(id) };
                    self.apply(&Edit::default().enqueue(Arc::new(asked)))?;
                    self.apply(&Edit::default().release(id))?;
                }
            }
            Event::Flood(hundreds) => {
                for _ in 0..hundreds {
                    let release = (0..100).fold(Edit::default(), |edit, _| edit.release(self.stranger()));
                    self.apply(&release)?;
                }
            }
            Event::Pass(millis) => self.now += millis,
            Event::Arrive(..) => {}
        }
        Ok(())
    }

    /// An id that no caller here has.
    fn stranger(&mut self) -> LeaseId {
        self.strangers += 1;
        let mut bytes = [0xff; 16];
        bytes[..8].copy_from_slice(&self.strangers.to_be_bytes());
        LeaseId::from(bytes)
    }

    /// The daemon hears what the record says, and tells the caller unless it refuses, or finds an id in use that it meant to keep
    /// out: then it asks again.
    fn hear(&mut self, who: u8, number: u32, was_kept_out: bool) {
        let snapshot = Snapshot { record: self.record.clone(), now: Timestamp(self.now) };
        let asks_again = was_kept_out && self.asks_again;
        let client = self.client(who);
        if client.asks == number && matches!(client.state, Caller::Asks | Caller::Waits) {
            match snapshot.standing(id(who)) {
                Standing::Holder(_) if asks_again => self.ask(who, true),
                Standing::Holder(_) => client.state = Caller::Holds,
                Standing::Waiter(_) => client.state = Caller::Waits,
                Standing::Departed(_) => client.state = Caller::Over,
                Standing::Unknown => self.refuse(who),
            }
        }
    }

    /// A daemon that asked for the id more than once, and whose earlier commands may still come, commits something first. The
    /// caller does not know yet.
    fn refuse(&mut self, who: u8) {
        let (now, refusal) = (self.now, self.refusal);
        let client = self.client(who);
        match refusal {
            Some(refusal) if client.asks > 1 && now <= client.asked_at + UNDER_WAY => {
                let heard_by = (who, client.asks);
                self.send(refusal(Edit::default(), id(who)), Some(heard_by));
            }
            _ => client.state = Caller::Over,
        }
    }

    /// Has all commands take effect that still can, those last that settle ids: daemons and callers send them until they
    /// are answered. Then whoever wants nothing more has nothing.
    fn end(&mut self) -> Result<(), TestCaseError> {
        let under_way = std::mem::take(&mut self.under_way);
        let (asks, others): (Vec<_>, Vec<_>) =
            under_way.into_iter().partition(|command| command.answers.is_some());
        for Command { edit, sent_at, .. } in asks {
            if self.now <= sent_at + UNDER_WAY {
                self.apply(&edit)?;
            }
        }
        for Command { edit, .. } in others {
            self.apply(&edit)?;
        }
        let held = |id| self.record.holders.iter().any(|holder| holder.id == id);
        let waits = |id| self.waiting().any(|waiting| waiting == id);
        for (who, Client { state, .. }) in &self.clients {
            prop_assert!(*state != Caller::Over || !(held(id(*who)) || waits(id(*who))), "{who} is a ghost");
        }
        Ok(())
    }
}

/// Mostly a few of the ids, so that what happens to each is long.
fn many() -> BoxedStrategy<u8> {
    prop_oneof![3 => 0_u8..4, 1 => 0..IDS].boxed()
}

/// Two that do not share and do not wait: one is refused while the other holds.
fn rivals() -> BoxedStrategy<u8> {
    prop::sample::select(vec![0, 3]).boxed()
}

fn events(who: BoxedStrategy<u8>) -> impl Strategy<Value = Vec<Event>> {
    let who = move || who.clone();
    let event = prop_oneof![
        3 => who().prop_map(Event::Call),
        6 => who().prop_map(Event::Ask),
        8 => (any::<usize>(), any::<bool>()).prop_map(|(which, heard)| Event::Arrive(which, heard)),
        1 => who().prop_map(Event::Touch),
        3 => who().prop_map(Event::Release),
        1 => who().prop_map(Event::Cancel),
        1 => who().prop_map(Event::Rejoin),
        1 => (0_usize..3).prop_map(Event::Revoke),
        2 => (1_u8..12).prop_map(Event::Crowd),
        2 => prop_oneof![3 => 0_i64..1000, 1 => 1000_i64..9000].prop_map(Event::Pass),
    ];
    prop::collection::vec(event, 1..80)
}

fn play(events: &[Event], step: Step) -> Result<(), TestCaseError> {
    World::new(step).play(events)
}

/// Plays random histories until one goes wrong.
fn find_fault(runner: &mut TestRunner, who: BoxedStrategy<u8>, world: NewWorld) -> Option<String> {
    match runner.run(&events(who), |events| world().play(&events)) {
        Ok(()) => None,
        Err(TestError::Fail(why, events)) => Some(format!("{why}\n{events:#?}")),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

#[test]
fn an_id_has_at_most_one_token_and_one_place_and_none_once_it_is_released() {
    let cases = std::env::var("LEASED_LATE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    for who in [many(), rivals()] {
        if let Some(fault) = find_fault(&mut TestRunner::new(config.clone()), who, || World::new(step)) {
            panic!("{fault}");
        }
    }
}

/// Finds them every time: the histories are the same in each run.
#[test]
fn random_histories_find_the_faults_of_broken_rules() {
    let broken: [(&str, BoxedStrategy<u8>, NewWorld); 3] = [
        ("departures are forgotten", many(), || {
            World::new(|mut record, edit, now, rules| {
                record.departures.clear();
                step(record, edit, now, rules)
            })
        }),
        ("a release that finds nothing settles nothing", many(), || {
            World::new(|record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                after.departures.retain(|departure| departure.reason != Reason::Settled);
                after
            })
        }),
        ("what is refused is released", rivals(), || World {
            refusal: Some(Edit::give_up),
            ..World::new(step)
        }),
    ];
    for (how, who, broken) in broken {
        let config =
            Config { cases: 20_000, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        assert!(find_fault(&mut TestRunner::new_with_rng(config, rng), who, broken).is_some(), "{how}");
    }
}

/// What each part of the rule is for: a history that has a ghost without it.
#[test]
fn without_any_part_of_the_rule_there_is_a_ghost() {
    use Event::{Arrive, Ask, Call, Crowd, Flood, Pass, Release, Revoke};
    const WHO: u8 = 1;
    // Of two commands the first is granted the lease, and the other comes when many others have come and gone.
    let twice = |between: &[Event]| {
        let begin = [Call(WHO), Ask(WHO), Ask(WHO), Arrive(0, false)];
        [&begin, between, &[Crowd(10), Arrive(0, false)]].concat()
    };
    let given_up = twice(&[Release(WHO), Arrive(1, false)]);
    let heard = twice(&[Ask(WHO), Arrive(1, true), Release(WHO), Arrive(1, false)]);
    let before_it_comes = vec![Call(WHO), Release(WHO), Arrive(0, false), Ask(WHO), Arrive(0, false)];
    let broken: [(&str, Vec<Event>, Step); 8] = [
        ("departures are remembered", given_up.clone(), |mut record, edit, now, rules| {
            record.departures.clear();
            step(record, edit, now, rules)
        }),
        ("some of them for long", given_up.clone(), |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            after.departures.truncate(REMEMBERED_DEPARTURES);
            after
        }),
        ("those of what was given up", given_up, |record, edit, now, rules| {
            let plain = edit.released().iter().fold(Edit::default(), |edit, id| edit.release(*id));
            step(record, if edit.released().is_empty() { edit } else { &plain }, now, rules)
        }),
        ("those of what was asked for more than once", heard, |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            after.holders.iter_mut().for_each(|holder| holder.repeated = false);
            after
        }),
        ("those of what was revoked", twice(&[Revoke(0)]), |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            for departure in &mut after.departures {
                departure.lasting &= departure.reason != Reason::Revoked;
            }
            after
        }),
        (
            "also when others release what nobody uses",
            twice(&[Flood(11), Revoke(0)]),
            |mut record, edit, now, rules| {
                // Ids that were settled count for the whole room alone.
                for departure in
                    record.departures.iter_mut().filter(|departure| departure.reason == Reason::Settled)
                {
                    departure.reason = Reason::Withdrawn;
                }
                step(record, edit, now, rules)
            },
        ),
        ("those of what was displaced", twice(&[Pass(1000)]), |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            for departure in &mut after.departures {
                departure.lasting &= departure.reason != Reason::Displaced;
            }
            after
        }),
        ("a release settles what is not known", before_it_comes, |record, edit, now, rules| {
            let mut after = step(record, edit, now, rules);
            after.departures.retain(|departure| departure.reason != Reason::Settled);
            after
        }),
    ];
    for (rule, history, broken) in broken {
        assert!(play(&history, step).is_ok(), "{rule}");
        assert!(play(&history, broken).is_err(), "nobody misses this rule: {rule}");
    }

    const HOLDER: u8 = 0;
    const TRY: u8 = 3;
    let holds = [Call(HOLDER), Ask(HOLDER), Arrive(0, true)];
    let refused = [Call(TRY), Ask(TRY), Ask(TRY), Arrive(1, true), Release(HOLDER), Arrive(1, false)];
    let history = [&holds[..], &refused].concat();
    assert!(play(&history, step).is_ok());
    let careless = World { refusal: None, ..World::new(step) };
    assert!(careless.play(&history).is_err(), "nobody misses that refused ids are kept out");

    // The refusal is not heard. The caller asks again, elsewhere, and is granted the lease; then what the refusal was to be
    // preceded by comes.
    let refused = [Call(TRY), Ask(TRY), Ask(TRY), Arrive(1, true)];
    let granted = [Ask(TRY), Release(HOLDER), Arrive(3, false), Arrive(2, true)];
    let history = [&holds[..], &refused, &granted, &[Arrive(1, false)]].concat();
    assert!(play(&history, step).is_ok());
    let cruel = World { refusal: Some(Edit::give_up), ..World::new(step) };
    assert!(cruel.play(&history).is_err(), "nobody misses that an id in use is left alone");

    // Of three commands the last is refused and the first is granted after that. The second comes when the lease is over.
    let refused =
        [Call(TRY), Ask(TRY), Ask(TRY), Ask(TRY), Arrive(2, true), Release(HOLDER), Arrive(3, false)];
    let granted = [Arrive(0, false), Arrive(1, true)];
    let over = [Release(TRY), Arrive(1, false), Crowd(10), Arrive(0, false)];
    let history = [&holds[..], &refused, &granted, &over].concat();
    assert!(play(&history, step).is_ok());
    let forgetful = World { asks_again: false, ..World::new(step) };
    assert!(
        forgetful.play(&history).is_err(),
        "nobody misses that an id which was not kept out is asked for again"
    );
    let history = [&holds[..], &refused, &granted, &[Arrive(1, true)], &over].concat();
    assert!(play(&history, step).is_ok());
}
