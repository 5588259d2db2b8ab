//! The rules as one aggregation pipeline over a whole batch of different edits.
//!
//! It says what [`crate::lease::step`] says, in the database's own language, because only the database's clock and
//! its atomicity can decide between daemons. The pipeline is the same for every record; what differs per key stands
//! in a constant table inside it, looked up by the position of the key. Everything that came from a caller stands
//! under `$literal`, where a string that begins with `$` is just a string. Stages that no edit of the batch needs
//! are left out: most of the cost of a lone edit is the parsing.

use mongodb::bson::{Bson, DateTime, Document, doc};

use super::document::{EDITED_AT, MARK, acquisition, reason, request, uuid};
use super::expression::{bind, filter, literal, map, not};
use crate::lease::{
    Edit, Key, LASTING_DEPARTURES, LeaseId, MAX_RECORD_BYTES, MAX_WAITERS, MEMORY, REMEMBERED_DEPARTURES,
    Reason, Rules, SETTLED_DEPARTURES, Timestamp, millis,
};

/// More than any array of a record holds; `$slice` wants a count.
const ALL: i32 = i32::MAX;

/// A field that is set to this is none.
const GONE: &str = "$$REMOVE";

/// The instant at which a pipeline acts: the clock of the database.
pub(super) const CLOCK: &str = "$$NOW";

/// The stages that apply each key's edit to its record at `now`, an expression, and leave `mark` in it.
pub(super) fn pipeline(batch: &[(Key, Edit)], rules: &Rules, now: &Bson, mark: i64) -> Vec<Document> {
    let parts = Parts::of(batch);
    let source = Source::new(batch, &parts);
    let mut stages = vec![begin(&source)];
    if parts.change_holders() {
        let Held { stay, gone, blocked_until } = Held::after(&parts, &source, now, Line::Present);
        let mut fields = doc! { "holders": stay };
        fields.extend(gone.map(|gone| ("gone".to_owned(), gone)));
        fields.extend(blocked_until.map(|until| ("blocked_until".to_owned(), until)));
        if parts.release {
            fields.insert("waiters", filter("$waiters", "left", not(&withdrawn(&source))));
        }
        stages.push(doc! { "$set": fields });
    }
    if parts.cancel || parts.refresh || parts.enqueue {
        stages.push(edit_line(&parts, &source, rules, now));
    }
    stages.push(admit(rules, now));
    stages.push(finish(&parts, &source, rules, now, mark));
    stages
}

/// A cheaper pipeline for edits that enqueue nobody, on keys without waiters: there is nobody to admit.
pub(super) fn without_line(batch: &[(Key, Edit)], now: &Bson, mark: i64) -> Vec<Document> {
    let parts = Parts::of(batch);
    let source = Source::new(batch, &parts);
    let Held { stay, gone, blocked_until } = Held::after(&parts, &source, now, Line::Empty);
    let rev = doc! { "$add": ["$rev", 1_i64] };
    let mut fields = doc! { "holders": stay, "rev": rev.clone(), EDITED_AT: now.clone(), MARK: mark };
    let gone = match gone {
        gone if parts.keep_out => {
            let gone = gone.unwrap_or(Bson::Array(Vec::new()));
            Some(and_kept_out(gone, ["$holders.id".into()], &source, now))
        }
        gone => gone,
    };
    if let Some(gone) = gone {
        fields.insert("departures", remembered(gone, &source, &parts, now));
    }
    fields.extend(blocked_until.map(|until| ("blocked_until".to_owned(), until)));
    match parts.loud {
        Loudness::All => drop(fields.insert("epoch", rev)),
        Loudness::Some => drop(fields.insert("epoch", doc! { "$cond": ["$edit.loud", rev, "$epoch"] })),
        Loudness::None => {}
    }
    let mut stages = Vec::new();
    if let Source::Table(own) = source {
        stages.push(doc! { "$set": { "edit": own } });
        fields.insert("edit", GONE);
    }
    stages.push(doc! { "$set": fields });
    stages
}

/// Which lists are not empty in every edit of the batch.
struct Parts {
    touch: bool,
    release: bool,
    /// Some released ids depart for long whatever became of them.
    lasting: bool,
    keep_out: bool,
    revoke: bool,
    unblock: bool,
    cancel: bool,
    refresh: bool,
    enqueue: bool,
    loud: Loudness,
}

impl Parts {
    fn of(batch: &[(Key, Edit)]) -> Self {
        let has = |part: fn(&Edit) -> bool| batch.iter().any(|(_, edit)| !part(edit));
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
            loud: Loudness::of(batch),
        }
    }

    fn change_holders(&self) -> bool {
        self.touch || self.release || self.revoke || self.unblock || self.enqueue
    }

    /// The names of the lists of ids that the edits have.
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

/// Whether anyone may stand in line at the keys of a batch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    Present,
    Empty,
}

/// Which edits of a batch other daemons should hear of: those that do more than touch leases and refresh places.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loudness {
    All,
    None,
    Some,
}

impl Loudness {
    fn of(batch: &[(Key, Edit)]) -> Self {
        let loud = batch.iter().filter(|(_, edit)| is_loud(edit)).count();
        match loud {
            0 => Self::None,
            _ if loud == batch.len() => Self::All,
            _ => Self::Some,
        }
    }
}

fn is_loud(edit: &Edit) -> bool {
    !edit.released().is_empty()
        || !edit.revoked().is_empty()
        || !edit.unblocked().is_empty()
        || !edit.cancelled().is_empty()
        || !edit.enqueued().is_empty()
}

/// Where a stage finds a record's own edit: in the table, or in the stage itself when all are the same, as a single one or
/// nudges are.
enum Source {
    Table(Document),
    Inline(Document),
}

impl Source {
    fn new(batch: &[(Key, Edit)], parts: &Parts) -> Self {
        match batch {
            [(_, edit), rest @ ..] if rest.iter().all(|(_, other)| other == edit) => {
                Self::Inline(encode(edit, parts))
            }
            _ => Self::Table(looked_up(batch, |edit| encode(edit, parts).into())),
        }
    }

    /// An expression for one of the edit's lists.
    fn list(&self, name: &str) -> Bson {
        match self {
            Self::Table(_) => format!("$edit.{name}").into(),
            Self::Inline(edit) => literal(edit.get(name).cloned().unwrap_or_else(|| Bson::Array(Vec::new()))),
        }
    }

    /// An expression for the ids that the edit asks for.
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

    /// An expression for every id that the edit is about; `None` if there are none.
    fn named(&self, parts: &Parts) -> Option<Bson> {
        let mut lists: Vec<Bson> = parts.named().map(|name| self.list(name)).collect();
        if parts.enqueue {
            lists.push(self.asked());
        }
        if lists.len() > 1 { Some(doc! { "$concatArrays": lists }.into()) } else { lists.pop() }
    }
}

fn encode(edit: &Edit, parts: &Parts) -> Document {
    let mut lists = Document::new();
    let mut list = |wanted: bool, name: &str, values: Vec<Bson>| {
        if wanted {
            lists.insert(name, values);
        }
    };
    let uuids = |ids: &[LeaseId]| ids.iter().map(|&id| uuid(id)).collect();
    list(parts.touch, "touch", uuids(edit.touched()));
    list(parts.release, "release", uuids(edit.released()));
    list(parts.lasting, "lasting", uuids(edit.lasting()));
    list(parts.keep_out, "keep_out", uuids(edit.kept_out()));
    list(parts.revoke, "revoke", uuids(edit.revoked()));
    list(parts.unblock, "unblock", edit.unblocked().iter().map(|&until| date(until)).collect());
    list(parts.cancel, "cancel", uuids(edit.cancelled()));
    list(parts.refresh, "refresh", uuids(edit.refreshed()));
    list(parts.enqueue, "asked", edit.enqueued().iter().map(|who| request(who).into()).collect());
    list(parts.enqueue, "enqueue", edit.enqueued().iter().map(|who| acquisition(who).into()).collect());
    if parts.loud == Loudness::Some && is_loud(edit) {
        lists.insert("loud", true);
    }
    lists
}

fn date(Timestamp(millis): Timestamp) -> Bson {
    DateTime::from_millis(millis).into()
}

/// What belongs to a record's key: a constant table, looked up by the position of the key.
fn looked_up(batch: &[(Key, Edit)], value: impl Fn(&Edit) -> Bson) -> Document {
    let keys: Vec<Bson> = batch.iter().map(|(key, _)| key.as_str().into()).collect();
    let values: Vec<Bson> = batch.iter().map(|(_, edit)| value(edit)).collect();
    let position = doc! { "$indexOfArray": [literal(keys.into()), "$_id"] };
    doc! { "$arrayElemAt": [literal(values.into()), position] }
}

/// Makes a record whole and lays its edit beside it.
fn begin(source: &Source) -> Document {
    let mut fields = doc! {
        "token": { "$ifNull": ["$token", 0_i64] },
        "holders": { "$ifNull": ["$holders", []] },
        "waiters": { "$ifNull": ["$waiters", []] },
        "departures": { "$ifNull": ["$departures", []] },
    };
    if let Source::Table(own) = source {
        fields.insert("edit", own.clone());
    }
    doc! { "$set": fields }
}

/// What an edit makes of the holders, as expressions.
struct Held {
    stay: Bson,
    /// The departures of this edit, newest first; `None` if it lets nobody go.
    gone: Option<Bson>,
    /// If it may have changed.
    blocked_until: Option<Bson>,
}

impl Held {
    fn after(parts: &Parts, source: &Source, now: &Bson, line: Line) -> Self {
        let released = doc! { "$in": ["$$h.id", source.list("release")] };
        let revoked = doc! { "$in": ["$$h.id", source.list("revoke")] };
        let (mut stay, mut gone, mut blocked_until) = (Bson::from("$holders"), Vec::new(), None);
        if parts.revoke {
            let mut which = vec![revoked.clone()];
            if parts.release {
                which.push(not(&released));
            }
            let leaving = filter("$holders", "h", doc! { "$and": which });
            gone.push(map(leaving, "h", departure("$$h.id", Reason::Revoked, now, if_room("$$room"))));
            stay = filter(stay, "h", not(&revoked));
        }
        if parts.release {
            let leaving = filter("$holders", "h", released.clone());
            let mut is_lasting = Bson::from("$$h.repeated");
            if parts.lasting {
                let named = doc! { "$in": ["$$h.id", source.list("lasting")] };
                is_lasting = doc! { "$or": [is_lasting, named] }.into();
            }
            let lasting = if_room(doc! { "$and": [is_lasting, "$$room"] });
            gone.push(map(leaving.clone(), "h", departure("$$h.id", Reason::Released, now, lasting)));
            if line == Line::Present {
                let leaving = filter("$waiters", "left", withdrawn(source));
                let departure = departure("$$left.id", Reason::Withdrawn, now, if_room("$$room"));
                gone.push(map(leaving, "left", departure));
            }
            gone.push(settled(source, now, line));
            stay = filter(stay, "h", not(&released));
            let bound = filter(leaving, "h", doc! { "$gt": ["$$h.min_hold", 0_i64] });
            let held_until = map(bound, "h", doc! { "$add": ["$$h.acquired_at", "$$h.min_hold"] });
            blocked_until = Some(doc! { "$max": ["$blocked_until", { "$max": held_until }] }.into());
        }
        if parts.unblock {
            let until = blocked_until.unwrap_or_else(|| "$blocked_until".into());
            let lifted = doc! { "$in": ["$$until", source.list("unblock")] };
            let rest = doc! { "$cond": [lifted, Bson::Null, "$$until"] };
            blocked_until = Some(bind(doc! { "until": until }, rest));
        }
        if parts.touch {
            stay = renewed(stay, doc! { "$in": ["$$h.id", source.list("touch")] }, doc! {}, now);
        }
        if parts.enqueue {
            let again = renewed(stay, is_asked("$$h", source), doc! { "repeated": true }, now);
            stay = bind(doc! { "asked": source.asked() }, again);
        }
        let all = match gone.len() {
            0 => None,
            1 => gone.pop(),
            _ => Some(doc! { "$concatArrays": gone }.into()),
        };
        Self { stay, gone: all.map(|all| with_room(all, now)), blocked_until }
    }
}

/// The `holders`. Those for which `which` is true are renewed, with `change` made to them as well.
fn renewed(holders: impl Into<Bson>, which: Document, mut change: Document, now: &Bson) -> Bson {
    let until = doc! { "$max": ["$$h.expires_at", { "$add": [now.clone(), "$$h.ttl"] }] };
    change.insert("expires_at", until);
    let touched = doc! { "$mergeObjects": ["$$h", change] };
    map(holders, "h", doc! { "$cond": [which, touched, "$$h"] })
}

/// Whether the edit asks again for the holder or waiter, and for the same. The ids are `$$asked`: in a crowd most are not
/// among them, which costs less to see than to compare the requests.
fn is_asked(whose: &str, source: &Source) -> Document {
    let [id, mode, limit] = ["id", "mode", "shared_limit"].map(|field| format!("{whose}.{field}"));
    let is_same = doc! { "$in": [{ "id": &id, "mode": mode, "shared_limit": limit }, source.list("asked")] };
    doc! { "$and": [{ "$in": [id, "$$asked"] }, is_same] }
}

/// Whether the waiter `$$left` is released.
fn withdrawn(source: &Source) -> Document {
    doc! { "$in": ["$$left.id", source.list("release")] }
}

/// The departures of released ids that are not known, as far as there is room for them.
fn settled(source: &Source, now: &Bson, line: Line) -> Bson {
    let mut known = vec!["$holders.id", "$departures.id"];
    if line == Line::Present {
        known.push("$waiters.id");
    }
    noted(source.list("release"), doc! { "$concatArrays": known }, now)
}

/// The departures `gone`, and those of ids to be kept out, but for ids that are in use after the edit and those that are over.
fn and_kept_out(gone: Bson, in_use: impl IntoIterator<Item = Bson>, source: &Source, now: &Bson) -> Bson {
    let over = ["$departures.id", "$$gone.id"].map(Bson::from);
    let known: Vec<Bson> = over.into_iter().chain(in_use).collect();
    let kept_out = noted(source.list("keep_out"), doc! { "$concatArrays": known }, now);
    let all = doc! { "$concatArrays": ["$$gone", with_room(kept_out, now)] };
    bind(doc! { "gone": gone }, all)
}

/// Departures of those of the `ids` that are not `known`, as far as there is room: half of it is for others.
fn noted(ids: Bson, known: Document, now: &Bson) -> Bson {
    let is_new = doc! { "$not": [{ "$in": ["$$id", "$$known"] }] };
    let unknown = bind(doc! { "known": known }, filter(ids, "id", is_new));
    let settled = filter("$$lasting", "d", doc! { "$eq": ["$$d.reason", reason(Reason::Settled)] });
    let room = doc! { "$min": ["$$room", room_beside(settled, SETTLED_DEPARTURES)] };
    map(doc! { "$slice": [unknown, room] }, "id", departure("$$id", Reason::Settled, now, true))
}

/// An expression that may use the departures that last, as `$$lasting`, and the `$$room` beside them.
fn with_room(expression: Bson, now: &Bson) -> Bson {
    let with_room = bind(doc! { "room": room("$$lasting") }, expression);
    bind(doc! { "lasting": lasting(now) }, with_room)
}

fn departure(id: &str, why: Reason, now: &Bson, lasting: impl Into<Bson>) -> Document {
    doc! { "id": id, "reason": reason(why), "at": now.clone(), "lasting": lasting.into() }
}

/// The field `lasting` if it is true, for which there must be room.
fn if_room(condition: impl Into<Bson>) -> Document {
    doc! { "$cond": [condition.into(), true, GONE] }
}

/// The departures that last.
fn lasting(now: &Bson) -> Bson {
    filter("$departures", "d", lasts(now))
}

/// How many departures a record can still note as lasting; zero is false.
fn room(lasting: impl Into<Bson>) -> Document {
    room_beside(lasting, LASTING_DEPARTURES)
}

fn room_beside(departures: impl Into<Bson>, most: usize) -> Document {
    let most = i32::try_from(most).unwrap_or(ALL);
    doc! { "$max": [0, { "$subtract": [most, { "$size": departures.into() }] }] }
}

/// Whether the departure `$$d` lasts.
fn lasts(now: &Bson) -> Document {
    let before = doc! { "$subtract": [now.clone(), millis(MEMORY)] };
    doc! { "$and": ["$$d.lasting", { "$gt": ["$$d.at", before] }] }
}

/// Cancel, refresh and enqueue.
fn edit_line(parts: &Parts, source: &Source, rules: &Rules, now: &Bson) -> Document {
    let until: Bson = doc! { "$add": [now.clone(), millis(rules.place)] }.into();
    let mut line = Bson::from("$waiters");
    if parts.cancel {
        line = filter(line, "w", not(&doc! { "$in": ["$$w.id", source.list("cancel")] }));
    }
    if parts.refresh {
        let is_refreshed = doc! { "$in": ["$$w.id", source.list("refresh")] };
        line = kept(line, is_refreshed, doc! {}, &until);
    }
    if parts.enqueue {
        line = arrive(line, parts, source, now, &until);
    }
    doc! { "$set": { "waiters": line } }
}

/// The `line`, the places kept until then for which `which` is true, and changed beside that.
fn kept(line: impl Into<Bson>, which: Document, mut change: Document, until: &Bson) -> Bson {
    change.insert("expires_at", doc! { "$max": ["$$w.expires_at", until.clone()] });
    map(line, "w", doc! { "$cond": [which, { "$mergeObjects": ["$$w", change] }, "$$w"] })
}

/// The `line` with the arrivals at its end, as far as there is room.
fn arrive(line: Bson, parts: &Parts, source: &Source, now: &Bson, until: &Bson) -> Bson {
    let refreshed = kept("$$line", is_asked("$$w", source), doc! { "repeated": true }, until);
    let mut known = vec!["$holders.id", "$$line.id", "$departures.id"];
    if parts.release || parts.revoke {
        known.push("$gone.id");
    }
    let is_new = doc! { "$not": [{ "$in": ["$$a.id", "$$known"] }] };
    let place = doc! { "$mergeObjects": ["$$a", { "since": now.clone(), "expires_at": until.clone() }] };
    let arrivals = map(filter(source.list("enqueue"), "a", is_new), "a", place);
    let size = doc! { "$add": [{ "$sum": "$holders.size" }, { "$sum": "$$line.size" }] };
    let room = doc! { "$and": [
        { "$lt": [{ "$size": "$$line" }, i32::try_from(MAX_WAITERS).unwrap_or(ALL)] },
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
    let outcome = bind(doc! { "known": { "$concatArrays": known }, "asked": source.asked() }, outcome);
    bind(doc! { "line": line }, outcome)
}

/// Goes down the line while its head fits. Leaves in `admission`: how many left the line (`left`), the holders made
/// (`granted`) and the last token; null when nobody waits or the key is blocked.
fn admit(rules: &Rules, now: &Bson) -> Document {
    let live = filter("$holders", "h", live(rules, now));
    let of_mode = |mode: &str| {
        let those = filter("$$live", "h", doc! { "$eq": ["$$h.mode", mode] });
        doc! { "$size": those }
    };
    let start = doc! {
        "open": true,
        "left": 0,
        "exclusive": of_mode("exclusive"),
        "shared": of_mode("shared"),
        "limit": { "$min": "$$live.shared_limit" },
        "token": "$token",
        "granted": [],
    };
    let is_exclusive = doc! { "$eq": ["$$this.mode", "exclusive"] };
    // The least of those there are: none while nobody holds.
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

/// The holder that the waiter `$$this` becomes, with `$$token`.
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

/// Puts the admission into effect; those who came only to try leave; `rev` rises, and `epoch` with it unless all was
/// quiet.
fn finish(parts: &Parts, source: &Source, rules: &Rules, now: &Bson, mark: i64) -> Document {
    let any = doc! { "$gt": [{ "$size": { "$ifNull": ["$admission.granted", []] } }, 0] };
    let live = live(rules, now);
    let leaving = filter("$holders", "h", not(&live));
    let displaced =
        map(leaving, "h", departure("$$h.id", Reason::Displaced, now, if_room(room(lasting(now)))));
    let stay = filter("$holders", "h", live);
    let mut gone = Bson::from(doc! { "$cond": [any.clone(), displaced, []] });
    if parts.release || parts.revoke {
        gone = doc! { "$concatArrays": [gone, "$gone"] }.into();
    }
    let rest = doc! { "$slice": ["$waiters", { "$ifNull": ["$admission.left", 0] }, ALL] };
    if parts.keep_out {
        let granted = doc! { "$ifNull": ["$admission.granted.id", []] };
        let waiting = map(rest.clone(), "w", "$$w.id");
        gone = and_kept_out(gone, ["$holders.id".into(), granted.into(), waiting], source, now);
    }
    let rev = doc! { "$add": [{ "$ifNull": ["$rev", 0_i64] }, 1_i64] };
    doc! { "$set": {
        "token": { "$ifNull": ["$admission.token", "$token"] },
        "holders": { "$cond": [any, { "$concatArrays": [stay, "$admission.granted"] }, "$holders"] },
        "waiters": filter(rest, "w", "$$w.wait"),
        "departures": remembered(gone, source, parts, now),
        "epoch": epoch(parts.loud, &rev),
        "rev": rev,
        EDITED_AT: now.clone(),
        MARK: mark,
        "edit": GONE,
        "gone": GONE,
        "admission": GONE,
    } }
}

/// The departures with those of this edit before them: the newest, those that the edit names, and those that last.
fn remembered(gone: Bson, source: &Source, parts: &Parts, now: &Bson) -> Bson {
    let count = doc! { "$max": [i32::try_from(REMEMBERED_DEPARTURES).unwrap_or(ALL), { "$size": "$$gone" }] };
    let mut is_kept = lasts(now);
    if let Some(named) = source.named(parts) {
        is_kept = doc! { "$or": [is_kept, { "$in": ["$$d.id", named] }] };
    }
    let others = filter(doc! { "$slice": ["$$all", "$$count", ALL] }, "d", is_kept);
    let all = doc! { "$concatArrays": [{ "$slice": ["$$all", "$$count"] }, others] };
    let both = doc! { "$concatArrays": ["$$gone", "$departures"] };
    let some = bind(doc! { "all": both, "count": count }, all);
    bind(doc! { "gone": gone }, doc! { "$cond": [{ "$eq": ["$$gone", []] }, "$departures", some] })
}

/// The revision of the latest edit that other daemons should hear of: one that does more than touch leases and refresh
/// places, or one that moved the line.
fn epoch(loud: Loudness, rev: &Document) -> Bson {
    let moved = doc! { "$gt": ["$admission.left", 0] };
    let told = match loud {
        Loudness::All => return rev.clone().into(),
        Loudness::None => moved,
        Loudness::Some => doc! { "$or": ["$edit.loud", moved] },
    };
    doc! { "$cond": [told, rev.clone(), "$epoch"] }.into()
}

/// Whether nobody may take the place of the holder `$$h` yet.
fn live(rules: &Rules, now: &Bson) -> Document {
    doc! { "$gt": [{ "$add": ["$$h.expires_at", millis(rules.grace)] }, now.clone()] }
}
