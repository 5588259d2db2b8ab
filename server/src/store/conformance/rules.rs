//! The rules, one by one, as sentences, for the specification and for both stores.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;

use super::backends::{Applier, Home};
use crate::lease::{
    Acquisition, Edit, FencingToken, Key, LASTING_DEPARTURES, LeaseId, MAX_RECORD_BYTES, MAX_WAITERS, Mode,
    Obstacle, REMEMBERED_DEPARTURES, Reason, Record, Rules, SETTLED_DEPARTURES, Snapshot, Standing, State,
    Timestamp, Ttl,
};

const RULES: Rules = Rules { grace: Duration::from_millis(100), place: Duration::from_millis(15_000) };
const TTL: i64 = 1000;

/// A key's record and the store's clock.
struct Desk {
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
    Acquisition {
        id: id(name),
        owner: name.to_owned(),
        metadata: BTreeMap::new(),
        mode: Mode::Exclusive,
        shared_limit: 1,
        ttl: Ttl::new(Duration::from_millis(1000)).expect("a second"),
        min_hold: Duration::ZERO,
        wait: true,
        repeated: false,
    }
}

fn trying(name: &str) -> Acquisition {
    Acquisition { wait: false, ..asking(name) }
}

fn sharing(name: &str, limit: u32) -> Acquisition {
    Acquisition { mode: Mode::Shared, shared_limit: limit, ..asking(name) }
}

impl Desk {
    fn at(home: Home) -> Self {
        let key = Key::try_from(LeaseId::random().reveal().as_str()).expect("a key");
        Self { applier: home.applier(RULES), record: Record::vacant(key), now: 1_000_000 }
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

    /// So many come and go.
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

    fn line(&self) -> Vec<&str> {
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
pub(super) fn a_free_key_is_granted_at_once_with_the_clock_for_a_token(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(trying("a"));
    assert_eq!(desk.holders(), ["a"]);
    assert_eq!(desk.record.token, FencingToken(desk.now));
    assert_eq!(desk.record.holders[0].token, FencingToken(desk.now));
    assert_eq!(desk.expires_at("a"), desk.now + TTL);
}

#[rstest]
pub(super) fn a_token_rises_also_when_the_clock_stands_still_or_steps_back(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(trying("a")).release("a").ask(trying("b"));
    assert_eq!(desk.record.token, FencingToken(desk.now + 1));
    let last = desk.record.token;
    desk.release("b").passes(-500).ask(trying("c")).passes(500).nudge();
    assert_eq!(desk.record.token, FencingToken(last.0 + 1));
}

#[rstest]
pub(super) fn who_only_tries_leaves_the_line_and_who_waits_stays(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(trying("b")).ask(asking("c"));
    assert_eq!((desk.holders(), desk.line()), (vec!["a"], vec!["c"]));
    assert_eq!(desk.snapshot().standing(id("b")), Standing::Unknown);
    assert_eq!(desk.snapshot().standing(id("c")), Standing::Waiter(0));
}

#[rstest]
pub(super) fn a_release_hands_over_to_the_first_in_line_in_the_same_step(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b")).ask(asking("c")).release("a");
    assert_eq!((desk.holders(), desk.line()), (vec!["b"], vec!["c"]));
    assert_eq!(desk.departed("a"), Some(Reason::Released));
}

#[rstest]
pub(super) fn a_release_is_remembered_and_may_be_repeated(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).release("a").ask(asking("b")).release("a");
    assert_eq!(desk.departed("a"), Some(Reason::Released));
    assert_eq!(desk.holders(), ["b"]);
}

#[rstest]
pub(super) fn a_touch_extends_and_never_shortens(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).passes(600).touch("a");
    let extended = desk.expires_at("a");
    assert_eq!(extended, desk.now + TTL);
    desk.passes(-500).touch("a");
    assert_eq!(desk.expires_at("a"), extended);
}

#[rstest]
pub(super) fn touching_what_one_does_not_hold_changes_nothing_but_the_revision(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b"));
    let before = desk.record.clone();
    desk.passes(300).touch("b").touch("stranger");
    assert_eq!(desk.record, Record { rev: before.rev + 2, ..before });
}

#[rstest]
pub(super) fn a_lapsed_lease_that_nobody_took_is_touched_back_to_life(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a"));
    let token = desk.record.token;
    desk.passes(10 * TTL).nudge().touch("a");
    assert_eq!(desk.holders(), ["a"]);
    assert_eq!(desk.expires_at("a"), desk.now + TTL);
    assert_eq!(desk.record.token, token);
}

#[rstest]
pub(super) fn a_lease_is_displaced_when_it_ran_out_and_the_grace_is_over_and_not_a_moment_before(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b")).passes(TTL + 99).nudge();
    assert_eq!(desk.holders(), ["a"]);
    desk.passes(1).nudge();
    assert_eq!(desk.holders(), ["b"]);
    assert_eq!(desk.departed("a"), Some(Reason::Displaced));
    desk.touch("a");
    assert_eq!(desk.holders(), ["b"], "gone for good");
}

#[rstest]
pub(super) fn a_late_duplicate_of_a_call_whose_lease_departed_makes_no_ghost(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).release("a").ask(asking("a"));
    assert!(desk.holders().is_empty() && desk.line().is_empty());
}

#[rstest]
pub(super) fn repeating_an_acquire_keeps_the_grant_and_the_place(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b")).ask(asking("c"));
    desk.ask(asking("b")).ask(asking("a"));
    assert_eq!((desk.holders(), desk.line()), (vec!["a"], vec!["b", "c"]));
}

#[rstest]
pub(super) fn a_revocation_takes_the_holder_with_that_id_only(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b"));
    desk.apply(&Edit::default().revoke(id("stranger")).revoke(id("b")));
    assert_eq!((desk.holders(), desk.line()), (vec!["a"], vec!["b"]));
    let revoke = Edit::default().revoke(id("a"));
    desk.apply(&revoke).apply(&revoke);
    assert_eq!(desk.holders(), ["b"], "repeated, it does not hit the successor");
    assert_eq!(desk.departed("a"), Some(Reason::Revoked));
}

#[rstest]
pub(super) fn min_hold_keeps_others_out_after_an_early_release(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(Acquisition { min_hold: Duration::from_millis(500), ..asking("a") }).ask(asking("b"));
    desk.passes(100).release("a");
    assert!(desk.holders().is_empty());
    assert_eq!(desk.record.blocked_until, Some(Timestamp(desk.now + 400)));
    desk.passes(399).nudge();
    assert!(desk.holders().is_empty());
    desk.passes(1).nudge();
    assert_eq!(desk.holders(), ["b"]);
}

#[rstest]
pub(super) fn who_cancels_leaves_the_line_and_a_holder_cannot(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b")).ask(asking("c")).cancel("b").cancel("a");
    assert_eq!((desk.holders(), desk.line()), (vec!["a"], vec!["c"]));
}

#[rstest]
pub(super) fn a_lapsed_place_is_lost_at_its_turn_and_not_before(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(Acquisition { ttl: Ttl::new(Duration::from_secs(60)).expect("a minute"), ..asking("a") });
    desk.ask(asking("b")).passes(14_000).ask(asking("c")).passes(2000).nudge();
    assert_eq!(desk.line(), ["b", "c"], "lapsed, and still there");
    assert_eq!(desk.snapshot().standing(id("c")), Standing::Waiter(0), "but not counted or shown");
    desk.release("a");
    assert_eq!((desk.holders(), desk.line()), (vec!["c"], vec![]));
}

#[rstest]
pub(super) fn a_refreshed_place_is_kept(#[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home) {
    let mut desk = Desk::at(home);
    desk.ask(Acquisition { ttl: Ttl::new(Duration::from_secs(60)).expect("a minute"), ..asking("a") });
    desk.ask(asking("b")).passes(14_000).ask(asking("b")).passes(14_000).release("a");
    assert_eq!(desk.holders(), ["b"]);
}

#[rstest]
pub(super) fn shared_holders_hold_together_up_to_the_limit_each_of_them_names(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(sharing("a", 2)).ask(sharing("b", 2)).ask(sharing("c", 2));
    assert_eq!((desk.holders(), desk.line()), (vec!["a", "b"], vec!["c"]));
    desk.release("a");
    assert_eq!(desk.holders(), ["b", "c"]);
    let tokens: Vec<_> = desk.record.holders.iter().map(|holder| holder.token).collect();
    assert!(tokens[0] < tokens[1]);
}

#[rstest]
pub(super) fn a_shared_request_does_not_overtake_an_earlier_exclusive_one(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(sharing("reader", 9)).ask(asking("writer")).ask(sharing("late", 9));
    assert_eq!((desk.holders(), desk.line()), (vec!["reader"], vec!["writer", "late"]));
    desk.release("reader");
    assert_eq!((desk.holders(), desk.line()), (vec!["writer"], vec!["late"]));
}

#[rstest]
pub(super) fn an_admission_takes_the_places_of_all_whose_time_is_over(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(sharing("a", 2)).passes(TTL + 100).ask(sharing("b", 2));
    assert_eq!(desk.holders(), ["b"], "were it touched back to life, too many would hold");
    assert_eq!(desk.departed("a"), Some(Reason::Displaced));
}

#[rstest]
pub(super) fn of_a_crowd_in_one_edit_the_first_is_admitted_and_the_others_are_refused(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let names: Vec<String> = (0..256).map(|number| number.to_string()).collect();
    let crowd = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(trying(name))));
    desk.apply(&crowd);
    assert_eq!((desk.holders(), desk.line()), (vec!["0"], vec![]));
}

#[rstest]
pub(super) fn of_single_releases_the_newest_are_remembered(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).release("a").others(REMEMBERED_DEPARTURES - 1);
    assert_eq!(desk.departed("a"), Some(Reason::Released));
    desk.ask(asking("next")).release("next");
    assert_eq!(desk.departed("a"), None);
    assert_eq!(desk.record.departures.len(), REMEMBERED_DEPARTURES);
    assert_eq!(desk.record.departures[0].id, id("next"), "the newest first");
}

/// So many names that share.
fn crowd(desk: &mut Desk, count: usize) -> Vec<String> {
    let names: Vec<String> = (0..count).map(|number| number.to_string()).collect();
    let come = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(sharing(name, 1024))));
    desk.apply(&come);
    names
}

#[rstest]
pub(super) fn an_edit_of_many_releases_or_revocations_may_be_repeated_also_when_others_come_between(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let names = crowd(&mut desk, 40);
    let (released, revoked) = names.split_at(20);
    let revoke = revoked.iter().fold(Edit::default(), |edit, name| edit.revoke(id(name)));
    for _ in 0..3 {
        desk.release_all(released).apply(&revoke).others(3);
        assert!(released.iter().all(|name| desk.departed(name) == Some(Reason::Released)));
        assert!(revoked.iter().all(|name| desk.departed(name) == Some(Reason::Revoked)));
    }
}

#[rstest]
pub(super) fn an_edit_never_makes_the_record_forget_whom_it_names(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).release("a");
    crowd(&mut desk, 10);
    // The ten give way to the one that comes, and fill the record's memory.
    let edit = Edit::default().enqueue(Arc::new(asking("a"))).enqueue(Arc::new(asking("b")));
    desk.passes(TTL + 100).apply(&edit);
    assert_eq!((desk.holders(), desk.departed("a")), (vec!["b"], Some(Reason::Released)));
    desk.apply(&edit);
    assert_eq!((desk.holders(), desk.line()), (vec!["b"], vec![]), "a ghost");
}

#[rstest]
pub(super) fn a_release_takes_the_place_in_line_too_and_for_good(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).ask(asking("b")).ask(asking("c")).release("b");
    assert_eq!((desk.line(), desk.departed("b")), (vec!["c"], Some(Reason::Withdrawn)));
    desk.release("b").ask(asking("b")).release("a");
    assert_eq!((desk.holders(), desk.line()), (vec!["c"], vec![]));
    desk.release("c").others(2 * REMEMBERED_DEPARTURES).ask(asking("b"));
    assert_eq!(desk.departed("b"), Some(Reason::Withdrawn), "remembered longer than others");
    assert!(desk.holders().is_empty());
}

#[rstest]
pub(super) fn a_release_that_comes_before_its_acquire_settles_the_id_for_a_minute(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.release("a");
    assert_eq!((desk.departed("a"), desk.record.rev), (Some(Reason::Settled), 1), "it makes the record");
    assert_eq!(desk.record.token, FencingToken(0), "of a key that was never granted");
    desk.ask(asking("a")).ask(trying("a")).release("a");
    assert_eq!((desk.holders(), desk.line(), desk.departed("a")), (vec![], vec![], Some(Reason::Settled)));
    desk.others(2 * REMEMBERED_DEPARTURES).passes(59_999).others(1).ask(asking("a"));
    assert_eq!((desk.holders(), desk.departed("a")), (vec![], Some(Reason::Settled)));
    desk.passes(1).others(1).ask(asking("a"));
    assert_eq!(desk.holders(), ["a"], "the minute is over");
}

#[rstest]
pub(super) fn an_id_is_kept_out_for_a_minute_unless_it_is_in_use(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let keep_out = |names: &[&str]| names.iter().fold(Edit::default(), |edit, name| edit.keep_out(id(name)));
    desk.apply(&keep_out(&["early"]));
    assert_eq!((desk.departed("early"), desk.record.rev), (Some(Reason::Settled), 1), "it makes the record");
    desk.ask(asking("a")).ask(asking("b")).apply(&keep_out(&["a", "b", "c", "early"]));
    assert_eq!((desk.holders(), desk.line()), (vec!["a"], vec!["b"]), "they are in use");
    let noted = desk.record.departures.iter().map(|departure| departure.id);
    assert_eq!(noted.collect::<Vec<_>>(), [id("c"), id("early")]);
    desk.release("a").apply(&keep_out(&["a"]));
    assert_eq!((desk.holders(), desk.departed("a")), (vec!["b"], Some(Reason::Released)));
    desk.release("b").others(2 * REMEMBERED_DEPARTURES).passes(59_999).ask(asking("c"));
    assert_eq!((desk.holders(), desk.departed("c")), (vec![], Some(Reason::Settled)), "a ghost");
    desk.passes(1).others(1).ask(asking("c"));
    assert_eq!(desk.holders(), ["c"], "the minute is over");
    // In the same edit as what ends the use of an id.
    desk.ask(asking("d"))
        .ask(asking("e"))
        .apply(&keep_out(&["c", "d", "e"]).release(id("c")).cancel(id("d")));
    assert_eq!(desk.departed("c"), Some(Reason::Released));
    assert_eq!((desk.holders(), desk.departed("d")), (vec!["e"], Some(Reason::Settled)));
    let noted = desk.record.departures.iter().map(|departure| departure.id).take(2);
    assert_eq!(noted.collect::<Vec<_>>(), [id("c"), id("d")]);
}

#[rstest]
pub(super) fn releases_that_find_nothing_leave_half_of_the_memory_to_leases_that_are_taken_away(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let names: Vec<String> = (0..SETTLED_DEPARTURES + 10).map(|number| number.to_string()).collect();
    desk.release_all(&names).release_all(&names);
    let (settled, refused) = names.split_at(SETTLED_DEPARTURES);
    assert!(settled.iter().all(|name| desk.departed(name) == Some(Reason::Settled)));
    assert!(refused.iter().all(|name| desk.departed(name).is_none()));
    desk.ask(asking("a")).ask(asking("b")).release("b").release("a");
    assert_eq!(desk.departed("b"), Some(Reason::Withdrawn), "what was there always goes");
    desk.ask(asking("c")).apply(&Edit::default().revoke(id("c"))).others(2 * REMEMBERED_DEPARTURES);
    assert_eq!(desk.departed("c"), Some(Reason::Revoked), "remembered longer than others");
    desk.ask(asking("c"));
    assert!(desk.holders().is_empty(), "a ghost");
    desk.passes(60_000).release(&refused[0]);
    assert_eq!(desk.departed(&refused[0]), Some(Reason::Settled), "there is room again");
    assert_eq!(desk.record.departures.len(), REMEMBERED_DEPARTURES);
}

#[rstest]
pub(super) fn a_record_whose_memory_is_full_settles_no_id_and_still_lets_holders_go(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let names: Vec<String> = (0..LASTING_DEPARTURES).map(|number| number.to_string()).collect();
    let wait = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(asking(name))));
    desk.apply(&wait).release_all(&names).release("unknown");
    assert_eq!(desk.departed("unknown"), None);
    desk.ask(asking("a")).ask(asking("b")).release("b").release("a");
    assert_eq!((desk.departed("a"), desk.departed("b")), (Some(Reason::Released), Some(Reason::Withdrawn)));
    assert_eq!(desk.record.departures.len(), LASTING_DEPARTURES + 2);
    assert_eq!(
        desk.record.departures.iter().filter(|departure| departure.lasting).count(),
        LASTING_DEPARTURES
    );
}

#[rstest]
pub(super) fn what_may_still_be_asked_for_is_remembered_for_a_minute_when_it_is_over(
    #[values(0, 1, 2, 3)] how: usize,
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    match how {
        // Asked for once more while it holds, while it waits, by a command that says so, and given up.
        0 => drop(desk.ask(asking("a")).ask(asking("a")).release("a")),
        1 => drop(desk.ask(asking("h")).ask(asking("a")).ask(asking("a")).release("h").release("a")),
        2 => drop(desk.ask(Acquisition { repeated: true, ..asking("a") }).release("a")),
        _ => drop(desk.ask(asking("a")).apply(&Edit::default().give_up(id("a")))),
    }
    desk.others(2 * REMEMBERED_DEPARTURES).ask(asking("a"));
    assert_eq!((desk.holders(), desk.departed("a")), (vec![], Some(Reason::Released)), "no ghost");
    desk.passes(60_000).others(1).ask(asking("a"));
    assert_eq!(desk.holders(), ["a"], "the minute is over");
}

#[rstest]
pub(super) fn an_id_in_use_with_another_mode_or_limit_stays_as_it_is(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(sharing("a", 5)).ask(asking("b"));
    let before = desk.record.clone();
    desk.passes(300).ask(asking("a")).ask(sharing("a", 4)).ask(sharing("b", 1)).ask(trying("a"));
    assert_eq!(desk.record, Record { rev: before.rev + 4, ..before });
    assert!(desk.snapshot().conflicts(&asking("a")) && desk.snapshot().conflicts(&sharing("b", 1)));
    assert!(!desk.snapshot().conflicts(&sharing("a", 5)) && !desk.snapshot().conflicts(&asking("b")));
    desk.ask(sharing("a", 5));
    assert_eq!(desk.expires_at("a"), desk.now + TTL, "the same again renews");
}

#[rstest]
pub(super) fn the_smallest_limit_of_those_who_share_holds_for_all(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(sharing("a", 9)).ask(sharing("b", 3)).ask(sharing("c", 9)).ask(sharing("d", 9));
    assert_eq!((desk.holders(), desk.line()), (vec!["a", "b", "c"], vec!["d"]));
    let shown = desk.record.holders.iter().map(|holder| holder.shared_limit);
    assert_eq!(shown.collect::<Vec<_>>(), [9, 3, 9]);
    assert_eq!(
        desk.snapshot().obstacle(&sharing("e", 9), &RULES),
        Some(Obstacle::Limit { holders: 3, limit: 3 })
    );
    desk.passes(500).touch("a").touch("c").passes(TTL - 501).nudge();
    assert_eq!(desk.line(), ["d"], "its limit holds while it does");
    admits_at(&mut desk, 101);
    assert_eq!(desk.holders(), ["a", "c", "d"]);
    desk.ask(sharing("e", 2));
    assert_eq!(desk.line(), ["e"], "nor is one with a small limit put beside too many");
}

#[rstest]
pub(super) fn what_stands_in_the_way_is_known(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let obstacle = |desk: &Desk, asked: Acquisition| match desk.snapshot().obstacle(&asked, &RULES) {
        None => "nothing".to_owned(),
        Some(Obstacle::MinHold(until)) => format!("a min_hold for {} ms", until.0 - desk.now),
        Some(Obstacle::Holder) => "a holder".to_owned(),
        Some(Obstacle::Limit { limit, .. }) => format!("a limit of {limit}"),
        Some(Obstacle::Waiter(waiter)) => format!("the waiter {}", waiter.acquisition.owner),
    };
    assert_eq!(obstacle(&desk, asking("x")), "nothing");
    desk.ask(sharing("a", 2));
    assert_eq!(obstacle(&desk, asking("x")), "a holder");
    assert_eq!(obstacle(&desk, sharing("x", 9)), "nothing");
    assert_eq!(obstacle(&desk, sharing("x", 1)), "a limit of 1");
    desk.ask(asking("b"));
    assert_eq!(obstacle(&desk, sharing("x", 9)), "the waiter b");
    desk.release("a").release("b").ask(Acquisition { min_hold: Duration::from_millis(500), ..asking("c") });
    desk.release("c").passes(100);
    assert_eq!(obstacle(&desk, sharing("x", 9)), "a min_hold for 400 ms");
}

#[rstest]
pub(super) fn a_block_that_is_lifted_lets_the_next_in_and_lifting_may_be_repeated(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(Acquisition { min_hold: Duration::from_secs(600), ..asking("a") }).release("a");
    desk.ask(asking("b"));
    let until = desk.record.blocked_until.expect("a block");
    desk.apply(&Edit::default().unblock(Timestamp(until.0 - 1)));
    assert_eq!(desk.line(), ["b"], "another block than the one that was seen");
    let lift = Edit::default().unblock(until);
    desk.apply(&lift).apply(&lift);
    assert_eq!((desk.holders(), desk.record.blocked_until), (vec!["b"], None));
}

#[rstest]
pub(super) fn a_refresh_keeps_a_place_and_never_makes_one(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let minute = Ttl::new(Duration::from_secs(60)).expect("a minute");
    desk.ask(Acquisition { ttl: minute, ..asking("a") }).ask(asking("b")).passes(14_000);
    let refresh = Edit::default().refresh(id("b")).refresh(id("c")).refresh(id("a"));
    desk.apply(&refresh).passes(14_000).release("a").apply(&refresh);
    assert_eq!((desk.holders(), desk.line()), (vec!["b"], vec![]));
    assert!(!desk.record.holders[0].repeated, "a refresh is no second request");
    let expires_at = desk.expires_at("b");
    desk.passes(100).apply(&refresh);
    assert_eq!(desk.expires_at("b"), expires_at, "nor a touch");
}

#[rstest]
pub(super) fn a_full_line_takes_nobody_but_loses_its_lapsed_places(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(Acquisition { ttl: Ttl::new(Duration::from_secs(60)).expect("a minute"), ..asking("holder") });
    let names: Vec<String> = (0..MAX_WAITERS).map(|number| number.to_string()).collect();
    let crowd = names.iter().fold(Edit::default(), |edit, name| edit.enqueue(Arc::new(asking(name))));
    desk.apply(&crowd).ask(asking("late"));
    assert_eq!(desk.line().len(), MAX_WAITERS);
    assert_eq!(desk.snapshot().standing(id("late")), Standing::Unknown);
    desk.passes(15_000).ask(asking("0")).ask(asking("late"));
    assert_eq!(desk.line(), ["0"]);
    desk.ask(asking("late"));
    assert_eq!(desk.line(), ["0", "late"]);
}

#[rstest]
pub(super) fn a_record_full_of_metadata_takes_nobody(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    let bulky = |name: &str| Acquisition {
        metadata: BTreeMap::from([("x".to_owned(), "y".repeat(4000))]),
        ..sharing(name, 1024)
    };
    let crowd = |count: usize| {
        (0..count)
            .fold(Edit::default(), |edit, number| edit.enqueue(Arc::new(bulky(&format!("{count}.{number}")))))
    };
    desk.apply(&crowd(240));
    for number in 0..20 {
        desk.ask(bulky(&number.to_string()));
    }
    assert!(desk.record.size() >= MAX_RECORD_BYTES);
    assert!(desk.record.size() < MAX_RECORD_BYTES + 8192);
}

#[rstest]
pub(super) fn every_edit_is_a_write_and_be_it_a_nudge(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a")).nudge().nudge().touch("stranger");
    assert_eq!(desk.record.rev, 4);
}

#[rstest]
pub(super) fn what_a_caller_writes_is_text_and_nothing_else(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    for text in
        ["$_id", "$$NOW", "$holders", "$$ROOT", "{$rev: 1}", "a.b", "\"'\\", "", "$", "владелец", "鍵"]
    {
        let mut desk = Desk::at(home);
        let metadata =
            BTreeMap::from([("$where".to_owned(), text.to_owned()), (text.to_owned(), "x".to_owned())]);
        let quoting =
            |name: &str| Acquisition { owner: text.to_owned(), metadata: metadata.clone(), ..asking(name) };
        desk.ask(quoting("a")).ask(quoting("b"));
        assert_eq!(desk.record.holders[0].owner, text);
        assert_eq!(desk.record.holders[0].metadata, metadata);
        assert_eq!(desk.record.waiters[0].acquisition.metadata, metadata);
        desk.release("a");
        assert_eq!(desk.record.holders[0].owner, text);
    }
}

/// The timer's hint: a nudge just before it changes nothing, and one at that instant admits the head.
fn admits_at(desk: &mut Desk, wait: i64) {
    let hint = desk.snapshot().next_admission(&RULES);
    assert_eq!(hint, Some(Duration::from_millis(u64::try_from(wait).expect("a time ahead"))));
    let line = desk.line().len();
    desk.passes(wait - 1).nudge();
    assert_eq!(desk.line().len(), line);
    desk.passes(1).nudge();
    assert_eq!(desk.line().len(), line - 1);
}

#[rstest]
pub(super) fn the_next_admission_is_when_the_holder_is_not_live_any_more(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(asking("a"));
    assert_eq!(desk.snapshot().next_admission(&RULES), None, "nobody waits");
    desk.ask(asking("b")).passes(300);
    admits_at(&mut desk, TTL + 100 - 300);
}

#[rstest]
pub(super) fn the_next_admission_of_a_shared_head_is_when_enough_have_gone(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(sharing("a", 3)).passes(100).ask(sharing("b", 3)).passes(100).ask(sharing("c", 3));
    desk.ask(sharing("d", 2));
    admits_at(&mut desk, TTL + 100 - 100);
}

#[rstest]
pub(super) fn the_next_admission_of_a_blocked_key_is_the_end_of_the_block(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    desk.ask(Acquisition { min_hold: Duration::from_millis(700), ..asking("a") })
        .ask(asking("b"))
        .release("a");
    admits_at(&mut desk, 700);
}

#[rstest]
pub(super) fn the_state_is_free_held_or_lapsed(
    #[values(Home::Step, Home::Embedded, Home::MongoDb)] home: Home,
) {
    let mut desk = Desk::at(home);
    assert_eq!(desk.snapshot().state(), State::Free);
    desk.ask(asking("a"));
    assert_eq!(desk.snapshot().state(), State::Held);
    assert_eq!(desk.snapshot().remaining(&desk.record.holders[0]), Duration::from_millis(1000));
    desk.passes(TTL);
    assert_eq!(desk.snapshot().state(), State::Lapsed);
    assert_eq!(desk.snapshot().remaining(&desk.record.holders[0]), Duration::ZERO);
}
