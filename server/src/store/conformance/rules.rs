//! The rules, each as a test whose name is the rule. Each test runs on the specification and on
//! both stores.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;

use super::backends::{Applier, Backend};
use crate::lease::{
    Acquisition, Edit, FencingToken, Key, LASTING_DEPARTURES, LeaseId, MAX_RECORD_BYTES, MAX_WAITERS, Mode,
    Obstacle, REMEMBERED_DEPARTURES, Reason, Record, Rules, SETTLED_DEPARTURES, Snapshot, Standing, State,
    Timestamp, Ttl,
};

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_millis(15_000) };
const TTL: i64 = 1000;

/// Applies edits to one key and keeps the key's record and the time.
struct Bench {
    applier: Applier,
    record: Record,
    now: i64,
}

/// The lease id that a name stands for.
fn id(name: &str) -> LeaseId {
    let mut bytes = [0; 16];
    for (byte, letter) in bytes.iter_mut().zip(name.bytes()) {
        *byte = letter;
    }
    LeaseId::from(bytes)
}

/// An exclusive acquisition that waits.
fn asking(name: &str) -> Acquisition {
    Acquisition { owner: name.to_owned(), ..Acquisition::waiting(id(name)) }
}

fn trying(name: &str) -> Acquisition {
    Acquisition { wait: false, ..asking(name) }
}

fn sharing(name: &str, limit: u32) -> Acquisition {
    Acquisition { mode: Mode::Shared, shared_limit: limit, ..asking(name) }
}

impl Bench {
    fn at(backend: Backend) -> Self {
        let key = Key::try_from(LeaseId::random().reveal().as_str()).expect("a key");
        Self { applier: backend.applier(RULES), record: Record::vacant(key), now: 1_000_000 }
    }

    fn apply(&mut self, edit: &Edit) -> &mut Self {
        let batch = vec![(self.record.key.clone(), edit.clone())];
        self.record = self.applier.apply(batch, Timestamp(self.now)).remove(0);
        self
    }

    fn passes(&mut self, millis: i64) -> &mut Self {
        self.now += millis;
        self
    }

    fn ask(&mut self, acquisition: Acquisition) -> &mut Self {
        self.apply(&Edit::default().enqueue(Arc::new(acquisition)))
    }

    fn touch(&mut self, name: &str) -> &mut Self {
        self.apply(&Edit::default().touch(id(name)))
    }

    fn release(&mut self, name: &str) -> &mut Self {
        self.apply(&Edit::default().release(id(name)))
    }

    fn release_all(&mut self, names: &[String]) -> &mut Self {
        self.apply(&names.iter().fold(Edit::default(), |edit, name| edit.release(id(name))))
    }

    /// Lets `count` other callers acquire and release the key.
    fn others(&mut self, count: usize) -> &mut Self {
        for number in 0..count {
            let name = format!("{}:{number}", self.record.rev);
            self.ask(asking(&name)).release(&name);
        }
        self
    }

    fn cancel(&mut self, name: &str) -> &mut Self {
        self.apply(&Edit::default().cancel(id(name)))
    }

    fn nudge(&mut self) -> &mut Self {
        self.apply(&Edit::default())
    }

    fn holders(&self) -> Vec<&str> {
        self.record.holders.iter().map(|holder| holder.owner.as_str()).collect()
    }

    fn queue(&self) -> Vec<&str> {
        self.record.waiters.iter().map(|waiter| waiter.acquisition.owner.as_str()).collect()
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { record: self.record.clone(), now: Timestamp(self.now) }
    }

    fn departed(&self, name: &str) -> Option<Reason> {
        match self.snapshot().standing(id(name)) {
            Standing::Departed(reason) => Some(reason),
            _ => None,
        }
    }

    fn expires_at(&self, name: &str) -> i64 {
        let holder = self.record.holders.iter().find(|holder| holder.id == id(name));
        holder.expect("a holder").expires_at.0
    }
}

#[rstest]
pub(super) fn a_free_key_is_granted_at_once_with_the_time_as_its_token(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(trying("a"));
    assert_eq!(bench.holders(), ["a"]);
    assert_eq!(bench.record.token, FencingToken(bench.now));
    assert_eq!(bench.record.holders[0].token, FencingToken(bench.now));
    assert_eq!(bench.expires_at("a"), bench.now + TTL);
}

#[rstest]
pub(super) fn a_token_rises_even_when_the_clock_stands_still_or_steps_back(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(trying("a")).release("a").ask(trying("b"));
    assert_eq!(bench.record.token, FencingToken(bench.now + 1));
    let last = bench.record.token;
    bench.release("b").passes(-500).ask(trying("c")).passes(500).nudge();
    assert_eq!(bench.record.token, FencingToken(last.0 + 1));
}

#[rstest]
pub(super) fn a_caller_that_only_tries_leaves_the_queue_and_a_waiter_stays(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(trying("b")).ask(asking("c"));
    assert_eq!((bench.holders(), bench.queue()), (vec!["a"], vec!["c"]));
    assert_eq!(bench.snapshot().standing(id("b")), Standing::Unknown);
    assert_eq!(bench.snapshot().standing(id("c")), Standing::Waiter(0));
}

#[rstest]
pub(super) fn a_release_hands_over_to_the_first_waiter_in_the_same_step(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b")).ask(asking("c")).release("a");
    assert_eq!((bench.holders(), bench.queue()), (vec!["b"], vec!["c"]));
    assert_eq!(bench.departed("a"), Some(Reason::Released));
}

#[rstest]
pub(super) fn a_release_is_remembered_and_may_be_repeated(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).release("a").ask(asking("b")).release("a");
    assert_eq!(bench.departed("a"), Some(Reason::Released));
    assert_eq!(bench.holders(), ["b"]);
}

#[rstest]
pub(super) fn a_touch_extends_and_never_shortens(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).passes(600).touch("a");
    let extended = bench.expires_at("a");
    assert_eq!(extended, bench.now + TTL);
    bench.passes(-500).touch("a");
    assert_eq!(bench.expires_at("a"), extended);
}

#[rstest]
pub(super) fn a_touch_of_an_id_that_holds_nothing_changes_only_the_revision(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b"));
    let before = bench.record.clone();
    bench.passes(300).touch("b").touch("stranger");
    assert_eq!(bench.record, Record { rev: before.rev + 2, ..before });
}

#[rstest]
pub(super) fn a_touch_revives_a_lapsed_lease_that_nobody_has_taken_over(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a"));
    let token = bench.record.token;
    bench.passes(10 * TTL).nudge().touch("a");
    assert_eq!(bench.holders(), ["a"]);
    assert_eq!(bench.expires_at("a"), bench.now + TTL);
    assert_eq!(bench.record.token, token);
}

#[rstest]
pub(super) fn a_lease_is_displaced_when_its_ttl_and_the_grace_are_over_and_not_before(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b")).passes(TTL + 99).nudge();
    assert_eq!(bench.holders(), ["a"]);
    bench.passes(1).nudge();
    assert_eq!(bench.holders(), ["b"]);
    assert_eq!(bench.departed("a"), Some(Reason::Displaced));
    bench.touch("a");
    assert_eq!(bench.holders(), ["b"], "the lease is lost for good");
}

#[rstest]
pub(super) fn a_late_duplicate_of_an_acquire_whose_lease_departed_grants_nothing(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).release("a").ask(asking("a"));
    assert!(bench.holders().is_empty() && bench.queue().is_empty());
}

#[rstest]
pub(super) fn repeating_an_acquire_keeps_the_lease_or_the_position(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b")).ask(asking("c"));
    bench.ask(asking("b")).ask(asking("a"));
    assert_eq!((bench.holders(), bench.queue()), (vec!["a"], vec!["b", "c"]));
}

#[rstest]
pub(super) fn a_revocation_removes_only_the_holder_with_that_id(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b"));
    bench.apply(&Edit::default().revoke(id("stranger")).revoke(id("b")));
    assert_eq!((bench.holders(), bench.queue()), (vec!["a"], vec!["b"]));
    let revoke = Edit::default().revoke(id("a"));
    bench.apply(&revoke).apply(&revoke);
    assert_eq!(bench.holders(), ["b"], "repeated, it does not revoke the next holder");
    assert_eq!(bench.departed("a"), Some(Reason::Revoked));
}

#[rstest]
pub(super) fn min_hold_keeps_others_out_after_an_early_release(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(Acquisition { min_hold: Duration::from_millis(500), ..asking("a") }).ask(asking("b"));
    bench.passes(100).release("a");
    assert!(bench.holders().is_empty());
    assert_eq!(bench.record.blocked_until, Some(Timestamp(bench.now + 400)));
    bench.passes(399).nudge();
    assert!(bench.holders().is_empty());
    bench.passes(1).nudge();
    assert_eq!(bench.holders(), ["b"]);
}

#[rstest]
pub(super) fn a_cancel_removes_a_waiter_and_no_holder(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b")).ask(asking("c")).cancel("b").cancel("a");
    assert_eq!((bench.holders(), bench.queue()), (vec!["a"], vec!["c"]));
}

#[rstest]
pub(super) fn a_lapsed_waiter_is_removed_at_its_turn_and_not_before(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(Acquisition { ttl: Ttl::new(Duration::from_secs(60)).expect("a minute"), ..asking("a") });
    bench.ask(asking("b")).passes(14_000).ask(asking("c")).passes(2000).nudge();
    assert_eq!(bench.queue(), ["b", "c"], "a lapsed waiter is still there");
    assert_eq!(bench.snapshot().standing(id("c")), Standing::Waiter(0), "but is not counted");
    bench.release("a");
    assert_eq!((bench.holders(), bench.queue()), (vec!["c"], vec![]));
}

#[rstest]
pub(super) fn a_waiter_that_asks_again_is_kept(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(Acquisition { ttl: Ttl::new(Duration::from_secs(60)).expect("a minute"), ..asking("a") });
    bench.ask(asking("b")).passes(14_000).ask(asking("b")).passes(14_000).release("a");
    assert_eq!(bench.holders(), ["b"]);
}

#[rstest]
pub(super) fn shared_holders_hold_together_up_to_the_limit_that_each_names(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(sharing("a", 2)).ask(sharing("b", 2)).ask(sharing("c", 2));
    assert_eq!((bench.holders(), bench.queue()), (vec!["a", "b"], vec!["c"]));
    bench.release("a");
    assert_eq!(bench.holders(), ["b", "c"]);
    let tokens: Vec<_> = bench.record.holders.iter().map(|holder| holder.token).collect();
    assert!(tokens[0] < tokens[1]);
}

#[rstest]
pub(super) fn a_shared_request_does_not_overtake_an_earlier_exclusive_one(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(sharing("reader", 9)).ask(asking("writer")).ask(sharing("late", 9));
    assert_eq!((bench.holders(), bench.queue()), (vec!["reader"], vec!["writer", "late"]));
    bench.release("reader");
    assert_eq!((bench.holders(), bench.queue()), (vec!["writer"], vec!["late"]));
}

#[rstest]
pub(super) fn an_admission_displaces_all_holders_whose_time_is_over(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(sharing("a", 2)).passes(TTL + 100).ask(sharing("b", 2));
    assert_eq!(bench.holders(), ["b"], "revived by a touch, it would be one holder too many");
    assert_eq!(bench.departed("a"), Some(Reason::Displaced));
}

#[rstest]
pub(super) fn of_many_acquires_in_one_edit_the_first_is_admitted_and_the_others_are_refused(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let names: Vec<String> = (0..256).map(|number| number.to_string()).collect();
    let crowd = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(trying(name))));
    bench.apply(&crowd);
    assert_eq!((bench.holders(), bench.queue()), (vec!["0"], vec![]));
}

#[rstest]
pub(super) fn the_newest_of_single_releases_are_remembered(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).release("a").others(REMEMBERED_DEPARTURES - 1);
    assert_eq!(bench.departed("a"), Some(Reason::Released));
    bench.ask(asking("next")).release("next");
    assert_eq!(bench.departed("a"), None);
    assert_eq!(bench.record.departures.len(), REMEMBERED_DEPARTURES);
    assert_eq!(bench.record.departures[0].id, id("next"), "the newest first");
}

/// Enqueues `count` shared acquisitions in one edit, and returns their names.
fn crowd(bench: &mut Bench, count: usize) -> Vec<String> {
    let names: Vec<String> = (0..count).map(|number| number.to_string()).collect();
    let enqueue =
        names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(sharing(name, 1024))));
    bench.apply(&enqueue);
    names
}

#[rstest]
pub(super) fn many_releases_or_revocations_in_one_edit_may_be_repeated_after_other_edits(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let names = crowd(&mut bench, 40);
    let (released, revoked) = names.split_at(20);
    let revoke = revoked.iter().fold(Edit::default(), |edit, name| edit.revoke(id(name)));
    for _ in 0..3 {
        bench.release_all(released).apply(&revoke).others(3);
        assert!(released.iter().all(|name| bench.departed(name) == Some(Reason::Released)));
        assert!(revoked.iter().all(|name| bench.departed(name) == Some(Reason::Revoked)));
    }
}

#[rstest]
pub(super) fn an_edit_never_makes_the_record_forget_an_id_that_it_names(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).release("a");
    crowd(&mut bench, 10);
    // The admission of "b" displaces the ten, whose departures fill the record's memory.
    let edit = Edit::default().enqueue(Arc::new(asking("a"))).enqueue(Arc::new(asking("b")));
    bench.passes(TTL + 100).apply(&edit);
    assert_eq!((bench.holders(), bench.departed("a")), (vec!["b"], Some(Reason::Released)));
    bench.apply(&edit);
    assert_eq!((bench.holders(), bench.queue()), (vec!["b"], vec![]), "a departed id is granted nothing");
}

#[rstest]
pub(super) fn a_release_removes_a_waiter_for_good(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).ask(asking("b")).ask(asking("c")).release("b");
    assert_eq!((bench.queue(), bench.departed("b")), (vec!["c"], Some(Reason::Withdrawn)));
    bench.release("b").ask(asking("b")).release("a");
    assert_eq!((bench.holders(), bench.queue()), (vec!["c"], vec![]));
    bench.release("c").others(2 * REMEMBERED_DEPARTURES).ask(asking("b"));
    assert_eq!(bench.departed("b"), Some(Reason::Withdrawn), "it is remembered longer than others");
    assert!(bench.holders().is_empty());
}

#[rstest]
pub(super) fn a_release_before_its_acquire_settles_the_id_for_a_minute(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.release("a");
    assert_eq!(
        (bench.departed("a"), bench.record.rev),
        (Some(Reason::Settled), 1),
        "the release makes the record"
    );
    assert_eq!(bench.record.token, FencingToken(0), "the key was never granted");
    bench.ask(asking("a")).ask(trying("a")).release("a");
    assert_eq!(
        (bench.holders(), bench.queue(), bench.departed("a")),
        (vec![], vec![], Some(Reason::Settled))
    );
    bench.others(2 * REMEMBERED_DEPARTURES).passes(59_999).others(1).ask(asking("a"));
    assert_eq!((bench.holders(), bench.departed("a")), (vec![], Some(Reason::Settled)));
    bench.passes(1).others(1).ask(asking("a"));
    assert_eq!(bench.holders(), ["a"], "the minute is over");
}

#[rstest]
pub(super) fn an_id_is_kept_out_for_a_minute_unless_it_is_in_use(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let keep_out = |names: &[&str]| names.iter().fold(Edit::default(), |edit, name| edit.keep_out(id(name)));
    bench.apply(&keep_out(&["early"]));
    assert_eq!(
        (bench.departed("early"), bench.record.rev),
        (Some(Reason::Settled), 1),
        "the edit makes the record"
    );
    bench.ask(asking("a")).ask(asking("b")).apply(&keep_out(&["a", "b", "c", "early"]));
    assert_eq!((bench.holders(), bench.queue()), (vec!["a"], vec!["b"]), "ids in use are not kept out");
    let noted = bench.record.departures.iter().map(|departure| departure.id);
    assert_eq!(noted.collect::<Vec<_>>(), [id("c"), id("early")]);
    bench.release("a").apply(&keep_out(&["a"]));
    assert_eq!((bench.holders(), bench.departed("a")), (vec!["b"], Some(Reason::Released)));
    bench.release("b").others(2 * REMEMBERED_DEPARTURES).passes(59_999).ask(asking("c"));
    assert_eq!(
        (bench.holders(), bench.departed("c")),
        (vec![], Some(Reason::Settled)),
        "an id that is kept out is granted nothing"
    );
    bench.passes(1).others(1).ask(asking("c"));
    assert_eq!(bench.holders(), ["c"], "the minute is over");
    // The same edit ends the use of some of the ids.
    bench
        .ask(asking("d"))
        .ask(asking("e"))
        .apply(&keep_out(&["c", "d", "e"]).release(id("c")).cancel(id("d")));
    assert_eq!(bench.departed("c"), Some(Reason::Released));
    assert_eq!((bench.holders(), bench.departed("d")), (vec!["e"], Some(Reason::Settled)));
    let noted = bench.record.departures.iter().map(|departure| departure.id).take(2);
    assert_eq!(noted.collect::<Vec<_>>(), [id("c"), id("d")]);
}

#[rstest]
pub(super) fn releases_of_unknown_ids_leave_half_of_the_memory_to_leases_that_are_taken_away(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let names: Vec<String> = (0..SETTLED_DEPARTURES + 10).map(|number| number.to_string()).collect();
    bench.release_all(&names).release_all(&names);
    let (settled, refused) = names.split_at(SETTLED_DEPARTURES);
    assert!(settled.iter().all(|name| bench.departed(name) == Some(Reason::Settled)));
    assert!(refused.iter().all(|name| bench.departed(name).is_none()));
    bench.ask(asking("a")).ask(asking("b")).release("b").release("a");
    assert_eq!(bench.departed("b"), Some(Reason::Withdrawn), "a waiter can always be released");
    bench.ask(asking("c")).apply(&Edit::default().revoke(id("c"))).others(2 * REMEMBERED_DEPARTURES);
    assert_eq!(bench.departed("c"), Some(Reason::Revoked), "it is remembered longer than others");
    bench.ask(asking("c"));
    assert!(bench.holders().is_empty(), "a revoked id is granted nothing");
    bench.passes(60_000).release(&refused[0]);
    assert_eq!(bench.departed(&refused[0]), Some(Reason::Settled), "there is room again");
    assert_eq!(bench.record.departures.len(), REMEMBERED_DEPARTURES);
}

#[rstest]
pub(super) fn a_record_whose_memory_is_full_settles_no_id_and_still_releases_holders(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let names: Vec<String> = (0..LASTING_DEPARTURES).map(|number| number.to_string()).collect();
    let wait = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(asking(name))));
    bench.apply(&wait).release_all(&names).release("unknown");
    assert_eq!(bench.departed("unknown"), None);
    bench.ask(asking("a")).ask(asking("b")).release("b").release("a");
    assert_eq!((bench.departed("a"), bench.departed("b")), (Some(Reason::Released), Some(Reason::Withdrawn)));
    assert_eq!(bench.record.departures.len(), LASTING_DEPARTURES + 2);
    assert_eq!(
        bench.record.departures.iter().filter(|departure| departure.lasting).count(),
        LASTING_DEPARTURES
    );
}

#[rstest]
pub(super) fn an_id_that_may_still_be_asked_for_is_remembered_for_a_minute_after_its_end(
    #[values(0, 1, 2, 3)] how: usize,
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    match how {
        // The id is asked for again while it holds; while it waits; by a command marked as a
        // repetition; or it is given up.
        0 => drop(bench.ask(asking("a")).ask(asking("a")).release("a")),
        1 => drop(bench.ask(asking("h")).ask(asking("a")).ask(asking("a")).release("h").release("a")),
        2 => drop(bench.ask(Acquisition { repeated: true, ..asking("a") }).release("a")),
        _ => drop(bench.ask(asking("a")).apply(&Edit::default().give_up(id("a")))),
    }
    bench.others(2 * REMEMBERED_DEPARTURES).ask(asking("a"));
    assert_eq!(
        (bench.holders(), bench.departed("a")),
        (vec![], Some(Reason::Released)),
        "a departed id is granted nothing"
    );
    bench.passes(60_000).others(1).ask(asking("a"));
    assert_eq!(bench.holders(), ["a"], "the minute is over");
}

#[rstest]
pub(super) fn an_acquire_with_another_mode_or_limit_does_not_change_an_id_in_use(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(sharing("a", 5)).ask(asking("b"));
    let before = bench.record.clone();
    bench.passes(300).ask(asking("a")).ask(sharing("a", 4)).ask(sharing("b", 1)).ask(trying("a"));
    assert_eq!(bench.record, Record { rev: before.rev + 4, ..before });
    assert!(bench.snapshot().conflicts(&asking("a")) && bench.snapshot().conflicts(&sharing("b", 1)));
    assert!(!bench.snapshot().conflicts(&sharing("a", 5)) && !bench.snapshot().conflicts(&asking("b")));
    bench.ask(sharing("a", 5));
    assert_eq!(bench.expires_at("a"), bench.now + TTL, "the same acquire again renews");
}

#[rstest]
pub(super) fn the_smallest_limit_of_shared_holders_applies_to_all(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(sharing("a", 9)).ask(sharing("b", 3)).ask(sharing("c", 9)).ask(sharing("d", 9));
    assert_eq!((bench.holders(), bench.queue()), (vec!["a", "b", "c"], vec!["d"]));
    let shown = bench.record.holders.iter().map(|holder| holder.shared_limit);
    assert_eq!(shown.collect::<Vec<_>>(), [9, 3, 9]);
    assert_eq!(
        bench.snapshot().obstacle(&sharing("e", 9), &RULES),
        Some(Obstacle::Limit { holders: 3, limit: 3 })
    );
    bench.passes(500).touch("a").touch("c").passes(TTL - 501).nudge();
    assert_eq!(bench.queue(), ["d"], "the limit of a holder applies while it holds");
    admits_at(&mut bench, 101);
    assert_eq!(bench.holders(), ["a", "c", "d"]);
    bench.ask(sharing("e", 2));
    assert_eq!(bench.queue(), ["e"], "an acquire with a smaller limit does not join more holders than that");
}

#[rstest]
pub(super) fn the_obstacle_of_an_acquire_is_known(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let obstacle = |bench: &Bench, asked: Acquisition| match bench.snapshot().obstacle(&asked, &RULES) {
        None => "nothing".to_owned(),
        Some(Obstacle::MinHold(until)) => format!("a min_hold for {} ms", until.0 - bench.now),
        Some(Obstacle::Holder) => "a holder".to_owned(),
        Some(Obstacle::Limit { limit, .. }) => format!("a limit of {limit}"),
        Some(Obstacle::Waiter(waiter)) => format!("the waiter {}", waiter.acquisition.owner),
    };
    assert_eq!(obstacle(&bench, asking("x")), "nothing");
    bench.ask(sharing("a", 2));
    assert_eq!(obstacle(&bench, asking("x")), "a holder");
    assert_eq!(obstacle(&bench, sharing("x", 9)), "nothing");
    assert_eq!(obstacle(&bench, sharing("x", 1)), "a limit of 1");
    bench.ask(asking("b"));
    assert_eq!(obstacle(&bench, sharing("x", 9)), "the waiter b");
    bench.release("a").release("b").ask(Acquisition { min_hold: Duration::from_millis(500), ..asking("c") });
    bench.release("c").passes(100);
    assert_eq!(obstacle(&bench, sharing("x", 9)), "a min_hold for 400 ms");
}

#[rstest]
pub(super) fn lifting_a_block_admits_the_next_waiter_and_may_be_repeated(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(Acquisition { min_hold: Duration::from_secs(600), ..asking("a") }).release("a");
    bench.ask(asking("b"));
    let until = bench.record.blocked_until.expect("a block");
    bench.apply(&Edit::default().unblock(Timestamp(until.0 - 1)));
    assert_eq!(bench.queue(), ["b"], "the edit names another block");
    let lift = Edit::default().unblock(until);
    bench.apply(&lift).apply(&lift);
    assert_eq!((bench.holders(), bench.record.blocked_until), (vec!["b"], None));
}

#[rstest]
pub(super) fn a_refresh_keeps_a_waiter_and_never_enqueues_one(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let minute = Ttl::new(Duration::from_secs(60)).expect("a minute");
    bench.ask(Acquisition { ttl: minute, ..asking("a") }).ask(asking("b")).passes(14_000);
    let refresh = Edit::default().refresh(id("b")).refresh(id("c")).refresh(id("a"));
    bench.apply(&refresh).passes(14_000).release("a").apply(&refresh);
    assert_eq!((bench.holders(), bench.queue()), (vec!["b"], vec![]));
    assert!(!bench.record.holders[0].repeated, "a refresh is no second request");
    let expires_at = bench.expires_at("b");
    bench.passes(100).apply(&refresh);
    assert_eq!(bench.expires_at("b"), expires_at, "a refresh is no touch");
}

#[rstest]
pub(super) fn a_full_queue_accepts_nobody_but_drops_its_lapsed_waiters(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(Acquisition { ttl: Ttl::new(Duration::from_secs(60)).expect("a minute"), ..asking("holder") });
    let names: Vec<String> = (0..MAX_WAITERS).map(|number| number.to_string()).collect();
    let crowd = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(asking(name))));
    bench.apply(&crowd).ask(asking("late"));
    assert_eq!(bench.queue().len(), MAX_WAITERS);
    assert_eq!(bench.snapshot().standing(id("late")), Standing::Unknown);
    bench.passes(15_000).ask(asking("0")).ask(asking("late"));
    assert_eq!(bench.queue(), ["0"]);
    bench.ask(asking("late"));
    assert_eq!(bench.queue(), ["0", "late"]);
}

#[rstest]
pub(super) fn a_record_full_of_metadata_accepts_nobody(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    let bulky = |name: &str| Acquisition {
        metadata: BTreeMap::from([("x".to_owned(), "y".repeat(4000))]),
        ..sharing(name, 1024)
    };
    let crowd = |count: usize| {
        (0..count)
            .fold(Edit::default(), |edit, number| edit.enqueue(Arc::new(bulky(&format!("{count}.{number}")))))
    };
    bench.apply(&crowd(240));
    for number in 0..20 {
        bench.ask(bulky(&number.to_string()));
    }
    assert!(bench.record.size() >= MAX_RECORD_BYTES);
    assert!(bench.record.size() < MAX_RECORD_BYTES + 8192);
}

#[rstest]
pub(super) fn every_edit_raises_the_revision_even_a_nudge(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a")).nudge().nudge().touch("stranger");
    assert_eq!(bench.record.rev, 4);
}

#[rstest]
pub(super) fn a_callers_text_is_never_evaluated(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    for text in
        ["$_id", "$$NOW", "$holders", "$$ROOT", "{$rev: 1}", "a.b", "\"'\\", "", "$", "владелец", "鍵"]
    {
        let mut bench = Bench::at(backend);
        let metadata =
            BTreeMap::from([("$where".to_owned(), text.to_owned()), (text.to_owned(), "x".to_owned())]);
        let quoting =
            |name: &str| Acquisition { owner: text.to_owned(), metadata: metadata.clone(), ..asking(name) };
        bench.ask(quoting("a")).ask(quoting("b"));
        assert_eq!(bench.record.holders[0].owner, text);
        assert_eq!(bench.record.holders[0].metadata, metadata);
        assert_eq!(bench.record.waiters[0].acquisition.metadata, metadata);
        bench.release("a");
        assert_eq!(bench.record.holders[0].owner, text);
    }
}

/// Checks that the next admission is due in `wait` milliseconds: a nudge just before changes
/// nothing, and one at that instant admits the head.
fn admits_at(bench: &mut Bench, wait: i64) {
    let hint = bench.snapshot().next_admission(&RULES);
    assert_eq!(hint, Some(Duration::from_millis(u64::try_from(wait).expect("a time ahead"))));
    let waiting = bench.queue().len();
    bench.passes(wait - 1).nudge();
    assert_eq!(bench.queue().len(), waiting);
    bench.passes(1).nudge();
    assert_eq!(bench.queue().len(), waiting - 1);
}

#[rstest]
pub(super) fn the_next_admission_is_when_the_holder_is_no_longer_live(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(asking("a"));
    assert_eq!(bench.snapshot().next_admission(&RULES), None, "nobody waits");
    bench.ask(asking("b")).passes(300);
    admits_at(&mut bench, TTL + 100 - 300);
}

#[rstest]
pub(super) fn the_next_admission_of_a_shared_head_is_when_enough_holders_are_no_longer_live(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench.ask(sharing("a", 3)).passes(100).ask(sharing("b", 3)).passes(100).ask(sharing("c", 3));
    bench.ask(sharing("d", 2));
    admits_at(&mut bench, TTL + 100 - 100);
}

#[rstest]
pub(super) fn the_next_admission_of_a_blocked_key_is_the_end_of_the_block(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    bench
        .ask(Acquisition { min_hold: Duration::from_millis(700), ..asking("a") })
        .ask(asking("b"))
        .release("a");
    admits_at(&mut bench, 700);
}

#[rstest]
pub(super) fn the_state_is_free_held_or_lapsed(
    #[values(Backend::Step, Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut bench = Bench::at(backend);
    assert_eq!(bench.snapshot().state(), State::Free);
    bench.ask(asking("a"));
    assert_eq!(bench.snapshot().state(), State::Held);
    assert_eq!(bench.snapshot().remaining(&bench.record.holders[0]), Duration::from_millis(1000));
    bench.passes(TTL);
    assert_eq!(bench.snapshot().state(), State::Lapsed);
    assert_eq!(bench.snapshot().remaining(&bench.record.holders[0]), Duration::ZERO);
}
