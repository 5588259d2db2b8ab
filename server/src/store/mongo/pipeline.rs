//! The rules as an aggregation pipeline, which applies a batch of different edits in one command.
//!
//! The pipeline does what [`crate::lease::step`] does, in the language of the database, because
//! only the database's clock and atomicity can decide between daemons. All records go through the
//! same stages. The edits are in a constant table inside the pipeline, and a stage finds the edit
//! of its record by the position of the key.
//!
//! Every value from a caller is under `$literal`, where a string that begins with `$` is just a
//! string.
//!
//! Stages that no edit of the batch needs are left out, because parsing is most of the cost of a
//! single edit.

use mongodb::bson::{Bson, DateTime, Document, doc};

use super::document::{COMMIT_TAG, EDITED_AT, acquisition, reason, request, uuid};
use super::expression::{bind, filter, literal, map, not};
use crate::lease::{
    Edit, Key, LASTING_DEPARTURES, LeaseId, MAX_RECORD_BYTES, MAX_WAITERS, MEMORY, REMEMBERED_DEPARTURES,
    Reason, Rules, SETTLED_DEPARTURES, Timestamp, millis,
};

/// A count for `$slice` that means "all": more than any array of a record has.
const ALL: i32 = i32::MAX;

/// A field that is set to this is removed.
const GONE: &str = "$$REMOVE";

/// The expression for the time of the database.
pub(super) const CLOCK: &str = "$$NOW";

/// Builds the stages that apply each key's edit to its record and store `tag` in the record. `now`
/// is an expression.
pub(super) fn pipeline(batch: &[(Key, Edit)], rules: &Rules, now: &Bson, tag: i64) -> Vec<Document> {
    let used = UsedLists::of(batch);
    let edits = EditSource::new(batch, &used);
    let mut stages = vec![begin(&edits)];
    if used.changes_holders() {
        let HolderChanges { stay, gone, blocked_until } =
            HolderChanges::after(&used, &edits, now, Waiters::Possible);
        let mut fields = doc! { "holders": stay };
        fields.extend(gone.map(|gone| ("gone".to_owned(), gone)));
        fields.extend(blocked_until.map(|until| ("blocked_until".to_owned(), until)));
        if used.release {
            fields.insert("waiters", filter("$waiters", "left", not(&withdrawn(&edits))));
        }
        stages.push(doc! { "$set": fields });
    }
    if used.cancel || used.refresh || used.enqueue {
        stages.push(edit_queue(&used, &edits, rules, now));
    }
    stages.push(admit(rules, now));
    stages.push(finish(&used, &edits, rules, now, tag));
    stages
}

/// Builds a cheaper pipeline for edits that enqueue no acquisition, on keys without waiters: there
/// is no waiter to admit.
pub(super) fn without_waiters(batch: &[(Key, Edit)], now: &Bson, tag: i64) -> Vec<Document> {
    let used = UsedLists::of(batch);
    let edits = EditSource::new(batch, &used);
    let HolderChanges { stay, gone, blocked_until } =
        HolderChanges::after(&used, &edits, now, Waiters::Absent);
    // The filter of the command matches only records that an edit has filled in, so no field is
    // missing.
    let rev = doc! { "$add": ["$rev", 1_i64] };
    let mut fields = doc! { "holders": stay, "rev": rev.clone(), EDITED_AT: now.clone(), COMMIT_TAG: tag };
    let gone = match gone {
        gone if used.keep_out => {
            let gone = gone.unwrap_or(Bson::Array(Vec::new()));
            Some(and_kept_out(gone, ["$holders.id".into()], &edits, now))
        }
        gone => gone,
    };
    if let Some(gone) = gone {
        fields.insert("departures", remembered(gone, &edits, &used, now));
    }
    fields.extend(blocked_until.map(|until| ("blocked_until".to_owned(), until)));
    match used.announced {
        Announces::All => drop(fields.insert("notify_rev", rev)),
        Announces::Some => {
            drop(fields.insert("notify_rev", doc! { "$cond": ["$edit.announced", rev, "$notify_rev"] }))
        }
        Announces::None => {}
    }
    let mut stages = Vec::new();
    if let EditSource::Table(lookup) = edits {
        stages.push(doc! { "$set": { "edit": lookup } });
        fields.insert("edit", GONE);
    }
    stages.push(doc! { "$set": fields });
    stages
}

/// Which lists are not empty in at least one edit of the batch, so that the pipeline needs stages
/// for them.
struct UsedLists {
    touch: bool,
    release: bool,
    /// Some released ids are noted as lasting even if they held and were asked for only once.
    lasting: bool,
    keep_out: bool,
    revoke: bool,
    unblock: bool,
    cancel: bool,
    refresh: bool,
    enqueue: bool,
    announced: Announces,
}

impl UsedLists {
    fn of(batch: &[(Key, Edit)]) -> Self {
        let has = |is_empty: fn(&Edit) -> bool| batch.iter().any(|(_, edit)| !is_empty(edit));
        Self {
            touch: has(|edit| edit.touched().is_empty()),
            release: has(|edit| edit.released().is_empty()),
            lasting: has(|edit| edit.lasting().is_empty()),
            keep_out: has(|edit| edit.kept_out().is_empty()),
            revoke: has(|edit| edit.revoked().is_empty()),
            unblock: has(|edit| edit.unblocked().is_empty()),
            cancel: has(|edit| edit.cancelled().is_empty()),
            refresh: has(|edit| edit.refreshed().is_empty()),
            enqueue: has(|edit| edit.enqueued().is_empty()),
            announced: Announces::of(batch),
        }
    }

    fn changes_holders(&self) -> bool {
        self.touch || self.release || self.revoke || self.unblock || self.enqueue
    }

    /// The names of the lists of ids that are used.
    fn named(&self) -> impl Iterator<Item = &'static str> {
        let lists = [
            (self.touch, "touch"),
            (self.release, "release"),
            (self.keep_out, "keep_out"),
            (self.revoke, "revoke"),
            (self.cancel, "cancel"),
            (self.refresh, "refresh"),
        ];
        lists.into_iter().filter(|(has, _)| *has).map(|(_, name)| name)
    }
}

/// Whether the keys of a batch may have waiters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiters {
    Possible,
    Absent,
}

/// Which edits of a batch [`is_announced`] selects, so that the change feed reports them even if
/// they admit no waiter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Announces {
    All,
    None,
    Some,
}

impl Announces {
    fn of(batch: &[(Key, Edit)]) -> Self {
        let announced = batch.iter().filter(|(_, edit)| is_announced(edit)).count();
        match announced {
            0 => Self::None,
            _ if announced == batch.len() => Self::All,
            _ => Self::Some,
        }
    }
}

/// Returns true if the edit does more than touch leases, refresh waiters and keep ids out.
fn is_announced(edit: &Edit) -> bool {
    !edit.released().is_empty()
        || !edit.revoked().is_empty()
        || !edit.unblocked().is_empty()
        || !edit.cancelled().is_empty()
        || !edit.enqueued().is_empty()
}

/// Where a stage finds the edit of its record: in a table, or, if all edits of the batch are equal,
/// as nudges are, in the stage itself. A look-up in the table compares and copies its keys for each
/// record.
enum EditSource {
    Table(Document),
    Inline(Document),
}

impl EditSource {
    fn new(batch: &[(Key, Edit)], used: &UsedLists) -> Self {
        match batch {
            [(_, edit), rest @ ..] if rest.iter().all(|(_, other)| other == edit) => {
                Self::Inline(encode(edit, used))
            }
            _ => Self::Table(look_up(batch, |edit| encode(edit, used).into())),
        }
    }

    /// An expression for the list `name` of the edit.
    fn list(&self, name: &str) -> Bson {
        match self {
            Self::Table(_) => format!("$edit.{name}").into(),
            Self::Inline(edit) => literal(edit.get(name).cloned().unwrap_or_else(|| Bson::Array(Vec::new()))),
        }
    }

    /// An expression for the ids that the edit enqueues.
    fn asked(&self) -> Bson {
        match self {
            Self::Table(_) => "$edit.asked.id".into(),
            Self::Inline(edit) => {
                let asked = edit.get_array("asked").into_iter().flatten();
                let ids = asked.filter_map(|one| one.as_document()?.get("id").cloned());
                literal(Bson::Array(ids.collect()))
            }
        }
    }

    /// An expression for all ids in the edit. `None` if no edit has any.
    fn named(&self, used: &UsedLists) -> Option<Bson> {
        let mut lists: Vec<Bson> = used.named().map(|name| self.list(name)).collect();
        if used.enqueue {
            lists.push(self.asked());
        }
        if lists.len() > 1 { Some(doc! { "$concatArrays": lists }.into()) } else { lists.pop() }
    }
}

fn encode(edit: &Edit, used: &UsedLists) -> Document {
    let mut lists = Document::new();
    let mut list = |is_used: bool, name: &str, values: Vec<Bson>| {
        if is_used {
            lists.insert(name, values);
        }
    };
    let uuids = |ids: &[LeaseId]| ids.iter().map(|&id| uuid(id)).collect();
    list(used.touch, "touch", uuids(edit.touched()));
    list(used.release, "release", uuids(edit.released()));
    list(used.lasting, "lasting", uuids(edit.lasting()));
    list(used.keep_out, "keep_out", uuids(edit.kept_out()));
    list(used.revoke, "revoke", uuids(edit.revoked()));
    list(used.unblock, "unblock", edit.unblocked().iter().map(|&until| date(until)).collect());
    list(used.cancel, "cancel", uuids(edit.cancelled()));
    list(used.refresh, "refresh", uuids(edit.refreshed()));
    list(used.enqueue, "asked", edit.enqueued().iter().map(|who| request(who).into()).collect());
    list(used.enqueue, "enqueue", edit.enqueued().iter().map(|who| acquisition(who).into()).collect());
    if used.announced == Announces::Some && is_announced(edit) {
        lists.insert("announced", true);
    }
    lists
}

fn date(Timestamp(millis): Timestamp) -> Bson {
    DateTime::from_millis(millis).into()
}

/// An expression for the value that belongs to the key of a record, in a constant table.
fn look_up(batch: &[(Key, Edit)], value: impl Fn(&Edit) -> Bson) -> Document {
    let keys: Vec<Bson> = batch.iter().map(|(key, _)| key.as_str().into()).collect();
    let values: Vec<Bson> = batch.iter().map(|(_, edit)| value(edit)).collect();
    let position = doc! { "$indexOfArray": [literal(keys.into()), "$_id"] };
    doc! { "$arrayElemAt": [literal(values.into()), position] }
}

/// The first stage: fills in missing fields and puts the edit beside the record.
fn begin(edits: &EditSource) -> Document {
    let mut fields = doc! {
        "token": { "$ifNull": ["$token", 0_i64] },
        "holders": { "$ifNull": ["$holders", []] },
        "waiters": { "$ifNull": ["$waiters", []] },
        "departures": { "$ifNull": ["$departures", []] },
    };
    if let EditSource::Table(lookup) = edits {
        fields.insert("edit", lookup.clone());
    }
    doc! { "$set": fields }
}

/// Expressions for the effect of an edit on the holders.
struct HolderChanges {
    /// The holders after the edit.
    stay: Bson,
    /// The departures of this edit, newest first. `None` if no edit of the batch can end a lease.
    gone: Option<Bson>,
    /// The block after the edit. `None` if no edit of the batch can change it.
    blocked_until: Option<Bson>,
}

impl HolderChanges {
    fn after(used: &UsedLists, edits: &EditSource, now: &Bson, waiters: Waiters) -> Self {
        let released = doc! { "$in": ["$$h.id", edits.list("release")] };
        let revoked = doc! { "$in": ["$$h.id", edits.list("revoke")] };
        let (mut stay, mut gone, mut blocked_until) = (Bson::from("$holders"), Vec::new(), None);
        if used.revoke {
            let mut which = vec![revoked.clone()];
            if used.release {
                which.push(not(&released));
            }
            let leaving = filter("$holders", "h", doc! { "$and": which });
            gone.push(map(leaving, "h", departure("$$h.id", Reason::Revoked, now, if_room("$$room"))));
            stay = filter(stay, "h", not(&revoked));
        }
        if used.release {
            let leaving = filter("$holders", "h", released.clone());
            let mut is_lasting = Bson::from("$$h.repeated");
            if used.lasting {
                let named = doc! { "$in": ["$$h.id", edits.list("lasting")] };
                is_lasting = doc! { "$or": [is_lasting, named] }.into();
            }
            let lasting = if_room(doc! { "$and": [is_lasting, "$$room"] });
            gone.push(map(leaving.clone(), "h", departure("$$h.id", Reason::Released, now, lasting)));
            if waiters == Waiters::Possible {
                let leaving = filter("$waiters", "left", withdrawn(edits));
                let departure = departure("$$left.id", Reason::Withdrawn, now, if_room("$$room"));
                gone.push(map(leaving, "left", departure));
            }
            gone.push(settled(edits, now, waiters));
            stay = filter(stay, "h", not(&released));
            // Only holders with a `min_hold` block the key. Otherwise a clock that steps back would
            // keep a released key from the next waiter.
            let bound = filter(leaving, "h", doc! { "$gt": ["$$h.min_hold", 0_i64] });
            let held_until = map(bound, "h", doc! { "$add": ["$$h.acquired_at", "$$h.min_hold"] });
            blocked_until = Some(doc! { "$max": ["$blocked_until", { "$max": held_until }] }.into());
        }
        if used.unblock {
            let until = blocked_until.unwrap_or_else(|| "$blocked_until".into());
            let lifted = doc! { "$in": ["$$until", edits.list("unblock")] };
            let rest = doc! { "$cond": [lifted, Bson::Null, "$$until"] };
            blocked_until = Some(bind(doc! { "until": until }, rest));
        }
        if used.touch {
            stay = renewed(stay, doc! { "$in": ["$$h.id", edits.list("touch")] }, doc! {}, now);
        }
        if used.enqueue {
            let again = renewed(stay, is_asked("$$h", edits), doc! { "repeated": true }, now);
            stay = bind(doc! { "asked": edits.asked() }, again);
        }
        let all = match gone.len() {
            0 => None,
            1 => gone.pop(),
            _ => Some(doc! { "$concatArrays": gone }.into()),
        };
        Self { stay, gone: all.map(|all| with_room(all, now)), blocked_until }
    }
}

/// The holders, of which those that match `which` are renewed and get the fields of `change`.
fn renewed(holders: impl Into<Bson>, which: Document, mut change: Document, now: &Bson) -> Bson {
    // Never shortens a lease: the clock may have stepped back.
    let until = doc! { "$max": ["$$h.expires_at", { "$add": [now.clone(), "$$h.ttl"] }] };
    change.insert("expires_at", until);
    let touched = doc! { "$mergeObjects": ["$$h", change] };
    map(holders, "h", doc! { "$cond": [which, touched, "$$h"] })
}

/// Whether the edit asks for a holder or waiter again, with the same mode and limit. `$$asked` are
/// the ids that it asks for. Comparing ids first is cheaper: of many holders and waiters most are
/// not asked for.
fn is_asked(whose: &str, edits: &EditSource) -> Document {
    let [id, mode, limit] = ["id", "mode", "shared_limit"].map(|field| format!("{whose}.{field}"));
    let is_same = doc! { "$in": [{ "id": &id, "mode": mode, "shared_limit": limit }, edits.list("asked")] };
    doc! { "$and": [{ "$in": [id, "$$asked"] }, is_same] }
}

/// Whether the edit releases the waiter `$$left`.
fn withdrawn(edits: &EditSource) -> Document {
    doc! { "$in": ["$$left.id", edits.list("release")] }
}

/// Departures for released ids that the record does not know, as far as there is room.
fn settled(edits: &EditSource, now: &Bson, waiters: Waiters) -> Bson {
    let mut known = vec!["$holders.id", "$departures.id"];
    if waiters == Waiters::Possible {
        known.push("$waiters.id");
    }
    noted(edits.list("release"), doc! { "$concatArrays": known }, now)
}

/// The departures `gone`, and departures for ids to be kept out. An id that is in use after the
/// edit, or that has departed, gets none.
fn and_kept_out(gone: Bson, in_use: impl IntoIterator<Item = Bson>, edits: &EditSource, now: &Bson) -> Bson {
    let over = ["$departures.id", "$$gone.id"].map(Bson::from);
    let known: Vec<Bson> = over.into_iter().chain(in_use).collect();
    let kept_out = noted(edits.list("keep_out"), doc! { "$concatArrays": known }, now);
    let all = doc! { "$concatArrays": ["$$gone", with_room(kept_out, now)] };
    bind(doc! { "gone": gone }, all)
}

/// Departures for the `ids` that are not in `known`, as far as there is room. At most
/// `SETTLED_DEPARTURES` of the lasting ones are settled, because anyone can release unused ids.
fn noted(ids: Bson, known: Document, now: &Bson) -> Bson {
    let is_new = doc! { "$not": [{ "$in": ["$$id", "$$known"] }] };
    let unknown = bind(doc! { "known": known }, filter(ids, "id", is_new));
    let settled = filter("$$lasting", "d", doc! { "$eq": ["$$d.reason", reason(Reason::Settled)] });
    let room = doc! { "$min": ["$$room", room_beside(settled, SETTLED_DEPARTURES)] };
    map(doc! { "$slice": [unknown, room] }, "id", departure("$$id", Reason::Settled, now, true))
}

/// Defines `$$lasting`, the departures that last, and `$$room`, how many more can last, for an
/// expression.
fn with_room(expression: Bson, now: &Bson) -> Bson {
    // In two steps, because the variables of one `$let` cannot use each other.
    let with_room = bind(doc! { "room": room("$$lasting") }, expression);
    bind(doc! { "lasting": lasting(now) }, with_room)
}

fn departure(id: &str, why: Reason, now: &Bson, lasting: impl Into<Bson>) -> Document {
    doc! { "id": id, "reason": reason(why), "at": now.clone(), "lasting": lasting.into() }
}

/// The value of the field `lasting`: true under the condition, else absent.
fn if_room(condition: impl Into<Bson>) -> Document {
    doc! { "$cond": [condition.into(), true, GONE] }
}

/// The departures in the record that last.
fn lasting(now: &Bson) -> Bson {
    filter("$departures", "d", lasts(now))
}

/// How many more departures a record can note as lasting. Zero counts as false in a condition.
fn room(lasting: impl Into<Bson>) -> Document {
    room_beside(lasting, LASTING_DEPARTURES)
}

fn room_beside(departures: impl Into<Bson>, most: usize) -> Document {
    let most = i32::try_from(most).unwrap_or(ALL);
    doc! { "$max": [0, { "$subtract": [most, { "$size": departures.into() }] }] }
}

/// Whether the record must still remember the departure `$$d`.
fn lasts(now: &Bson) -> Document {
    let before = doc! { "$subtract": [now.clone(), millis(MEMORY)] };
    doc! { "$and": ["$$d.lasting", { "$gt": ["$$d.at", before] }] }
}

/// The stage that cancels, refreshes and enqueues.
fn edit_queue(used: &UsedLists, edits: &EditSource, rules: &Rules, now: &Bson) -> Document {
    let until: Bson = doc! { "$add": [now.clone(), millis(rules.waiter_ttl)] }.into();
    let mut queue = Bson::from("$waiters");
    if used.cancel {
        queue = filter(queue, "w", not(&doc! { "$in": ["$$w.id", edits.list("cancel")] }));
    }
    if used.refresh {
        // A refresh never makes an entry, because a late one would make an entry for which no call
        // waits.
        let is_refreshed = doc! { "$in": ["$$w.id", edits.list("refresh")] };
        queue = kept(queue, is_refreshed, doc! {}, &until);
    }
    if used.enqueue {
        queue = arrive(queue, used, edits, now, &until);
    }
    doc! { "$set": { "waiters": queue } }
}

/// The queue, in which the waiters that match `which` are kept until `until` and get the fields of
/// `change`.
fn kept(queue: impl Into<Bson>, which: Document, mut change: Document, until: &Bson) -> Bson {
    change.insert("expires_at", doc! { "$max": ["$$w.expires_at", until.clone()] });
    map(queue, "w", doc! { "$cond": [which, { "$mergeObjects": ["$$w", change] }, "$$w"] })
}

/// The queue with the arrivals at its end. A full record accepts no arrival and drops its lapsed
/// entries, so that the waiters of dead daemons cannot keep it full for good.
fn arrive(queue: Bson, used: &UsedLists, edits: &EditSource, now: &Bson, until: &Bson) -> Bson {
    let refreshed = kept("$$queue", is_asked("$$w", edits), doc! { "repeated": true }, until);
    let mut known = vec!["$holders.id", "$$queue.id", "$departures.id"];
    if used.release || used.revoke {
        known.push("$gone.id");
    }
    let is_new = doc! { "$not": [{ "$in": ["$$a.id", "$$known"] }] };
    let entry = doc! { "$mergeObjects": ["$$a", { "since": now.clone(), "expires_at": until.clone() }] };
    let arrivals = map(filter(edits.list("enqueue"), "a", is_new), "a", entry);
    let size = doc! { "$add": [{ "$sum": "$holders.size" }, { "$sum": "$$queue.size" }] };
    let room = doc! { "$and": [
        { "$lt": [{ "$size": "$$queue" }, i32::try_from(MAX_WAITERS).unwrap_or(ALL)] },
        { "$lt": [size, i64::try_from(MAX_RECORD_BYTES).unwrap_or(i64::MAX)] },
    ] };
    let lasting = filter("$$refreshed", "w", doc! { "$gt": ["$$w.expires_at", now.clone()] });
    let outcome = doc! { "$switch": {
        "branches": [
            { "case": { "$eq": ["$$arrivals", []] }, "then": "$$refreshed" },
            { "case": room, "then": { "$concatArrays": ["$$refreshed", "$$arrivals"] } },
        ],
        "default": lasting,
    } };
    let outcome = bind(doc! { "refreshed": refreshed, "arrivals": arrivals }, outcome);
    let outcome = bind(doc! { "known": { "$concatArrays": known }, "asked": edits.asked() }, outcome);
    bind(doc! { "queue": queue }, outcome)
}

/// The stage that admits waiters from the head of the queue while the head fits. It sets
/// `admission`: how many left the queue (`left`), the new holders (`granted`) and the latest token.
/// Null if there is no waiter or the key is blocked.
fn admit(rules: &Rules, now: &Bson) -> Document {
    let live = filter("$holders", "h", live(rules, now));
    let of_mode = |mode: &str| {
        let those = filter("$$live", "h", doc! { "$eq": ["$$h.mode", mode] });
        doc! { "$size": those }
    };
    let start = doc! {
        // `$reduce` visits every waiter. After the first head that does not fit, `open` is false.
        "open": true,
        "left": 0,
        "exclusive": of_mode("exclusive"),
        "shared": of_mode("shared"),
        "limit": { "$min": "$$live.shared_limit" },
        "token": "$token",
        "granted": [],
    };
    let is_exclusive = doc! { "$eq": ["$$this.mode", "exclusive"] };
    // Without a holder the limit is missing, and `$min` ignores it.
    let limit = doc! { "$min": ["$$value.limit", "$$this.shared_limit"] };
    let room = doc! { "$cond": [
        is_exclusive.clone(),
        { "$eq": ["$$value.shared", 0] },
        { "$lt": ["$$value.shared", limit.clone()] },
    ] };
    let fits = doc! { "$and": ["$$value.open", { "$eq": ["$$value.exclusive", 0] }, room] };
    let left = doc! { "$add": ["$$value.left", 1] };
    let one_more = |mode: &str, yes: i32, no: i32| {
        doc! { "$add": [format!("$$value.{mode}"), { "$cond": [is_exclusive.clone(), yes, no] }] }
    };
    let granted = bind(
        doc! { "token": { "$max": [{ "$add": ["$$value.token", 1_i64] }, { "$toLong": now.clone() }] } },
        doc! {
            "open": true,
            "left": left.clone(),
            "exclusive": one_more("exclusive", 1, 0),
            "shared": one_more("shared", 0, 1),
            "limit": limit,
            "token": "$$token",
            "granted": { "$concatArrays": ["$$value.granted", [holder(now)]] },
        },
    );
    let next = doc! { "$switch": {
        "branches": [
            { "case": not(&fits), "then": { "$mergeObjects": ["$$value", { "open": false }] } },
            {
                "case": { "$lte": ["$$this.expires_at", now.clone()] },
                "then": { "$mergeObjects": ["$$value", { "left": left }] },
            },
        ],
        "default": granted,
    } };
    let walk = bind(
        doc! { "live": live },
        doc! { "$reduce": { "input": "$waiters", "initialValue": start, "in": next } },
    );
    let nobody = doc! { "$or": [
        { "$eq": ["$waiters", []] },
        { "$gt": ["$blocked_until", now.clone()] },
    ] };
    doc! { "$set": { "admission": { "$cond": [nobody, Bson::Null, walk] } } }
}

/// The holder that the waiter `$$this` becomes, with the token `$$token`.
fn holder(now: &Bson) -> Document {
    let mut holder = doc! {
        "token": "$$token",
        "acquired_at": now.clone(),
        "expires_at": { "$add": [now.clone(), "$$this.ttl"] },
    };
    for field in ["id", "owner", "metadata", "mode", "shared_limit", "ttl", "min_hold", "size", "repeated"] {
        holder.insert(field, format!("$$this.{field}"));
    }
    holder
}

/// The last stage of the rules. It applies the admission, removes acquisitions that do not wait,
/// and raises `rev`, and `notify_rev` with it if the change feed must report the edit.
fn finish(used: &UsedLists, edits: &EditSource, rules: &Rules, now: &Bson, tag: i64) -> Document {
    let any = doc! { "$gt": [{ "$size": { "$ifNull": ["$admission.granted", []] } }, 0] };
    let live = live(rules, now);
    let leaving = filter("$holders", "h", not(&live));
    // An admission displaces every holder that is no longer live, shared ones too: a later touch
    // could revive them, and there would be more holders than the limit.
    let displaced =
        map(leaving, "h", departure("$$h.id", Reason::Displaced, now, if_room(room(lasting(now)))));
    let stay = filter("$holders", "h", live);
    let mut gone = Bson::from(doc! { "$cond": [any.clone(), displaced, []] });
    if used.release || used.revoke {
        gone = doc! { "$concatArrays": [gone, "$gone"] }.into();
    }
    let rest = doc! { "$slice": ["$waiters", { "$ifNull": ["$admission.left", 0] }, ALL] };
    if used.keep_out {
        let granted = doc! { "$ifNull": ["$admission.granted.id", []] };
        let waiting = map(rest.clone(), "w", "$$w.id");
        gone = and_kept_out(gone, ["$holders.id".into(), granted.into(), waiting], edits, now);
    }
    let rev = doc! { "$add": [{ "$ifNull": ["$rev", 0_i64] }, 1_i64] };
    doc! { "$set": {
        "token": { "$ifNull": ["$admission.token", "$token"] },
        "holders": { "$cond": [any, { "$concatArrays": [stay, "$admission.granted"] }, "$holders"] },
        "waiters": filter(rest, "w", "$$w.wait"),
        "departures": remembered(gone, edits, used, now),
        "notify_rev": notify_rev(used.announced, &rev),
        "rev": rev,
        EDITED_AT: now.clone(),
        COMMIT_TAG: tag,
        "edit": GONE,
        "gone": GONE,
        "admission": GONE,
    } }
}

/// The departures to remember: all of this edit, the newest eight, those whose ids the edit names,
/// and those that last.
fn remembered(gone: Bson, edits: &EditSource, used: &UsedLists, now: &Bson) -> Bson {
    let count = doc! { "$max": [i32::try_from(REMEMBERED_DEPARTURES).unwrap_or(ALL), { "$size": "$$gone" }] };
    let mut is_kept = lasts(now);
    if let Some(named) = edits.named(used) {
        is_kept = doc! { "$or": [is_kept, { "$in": ["$$d.id", named] }] };
    }
    let others = filter(doc! { "$slice": ["$$all", "$$count", ALL] }, "d", is_kept);
    let all = doc! { "$concatArrays": [{ "$slice": ["$$all", "$$count"] }, others] };
    let both = doc! { "$concatArrays": ["$$gone", "$departures"] };
    let some = bind(doc! { "all": both, "count": count }, all);
    bind(doc! { "gone": gone }, doc! { "$cond": [{ "$eq": ["$$gone", []] }, "$departures", some] })
}

/// The revision of the latest edit that the change feed must report: one that is announced, or one
/// that admitted a waiter or removed a lapsed one.
fn notify_rev(announced: Announces, rev: &Document) -> Bson {
    let queue_changed = doc! { "$gt": ["$admission.left", 0] };
    let must_announce = match announced {
        Announces::All => return rev.clone().into(),
        Announces::None => queue_changed,
        Announces::Some => doc! { "$or": ["$edit.announced", queue_changed] },
    };
    doc! { "$cond": [must_announce, rev.clone(), "$notify_rev"] }.into()
}

/// Whether the holder `$$h` is live: it cannot be displaced yet.
fn live(rules: &Rules, now: &Bson) -> Document {
    doc! { "$gt": [{ "$add": ["$$h.expires_at", millis(rules.grace)] }, now.clone()] }
}
