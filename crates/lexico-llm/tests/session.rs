//! Sessions: what is read again and what is not, and that nothing else changes what is generated.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

use lexico_llm::chat::{ChatTemplate, Message};
use lexico_llm::generate::{Finish, GenerateOptions};
use lexico_llm::sample::Sampling;
use lexico_llm::saved::SavedGeneration;
use lexico_llm::session::{Answer, Session};
use lexico_llm::{Error, Model};

const QUESTION: &str = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. How many coins?";
const NEXT: &str = "\n\nQuestion: Ben has 3 hens. How many hens?";
/// No position is rounded, so that tokens do not depend on what was read at once.
const EXACT: &str = "full:dense=f32";

static MODEL: LazyLock<Arc<Model>> = LazyLock::new(|| Arc::new(Model::tiny().unwrap()));

fn hot(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        repetition_penalty: 1.2,
        seed,
        ..Sampling::default()
    }
}

fn session(cache: &str, sampling: Sampling) -> Session {
    Session::new(Arc::clone(&MODEL), cache.parse().unwrap(), sampling).unwrap()
}

fn plain() -> Session {
    session(EXACT, Sampling::default())
}

/// A conversation whose text is that of its messages, one after the other.
fn conversation() -> Session {
    let source = "{% for message in messages %}{{ message.content }}{% endfor %}";
    let template = ChatTemplate::parse(source, Vec::new()).unwrap();
    plain().with_chat(template, None)
}

fn tokens(count: usize) -> GenerateOptions {
    GenerateOptions {
        max_tokens: count,
        ignore_end: true,
        goes_on: true,
        ..GenerateOptions::default()
    }
}

fn silent(_: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn prompt(session: &mut Session, text: &str, count: usize) -> Answer {
    session.prompt(text, &tokens(count), &mut silent).unwrap()
}

fn go_on(session: &mut Session, count: usize) -> Answer {
    session.go_on(&tokens(count), &mut silent).unwrap()
}

#[test]
fn a_second_prompt_reads_only_what_is_new() {
    let mut session = plain();
    let first = prompt(&mut session, QUESTION, 20);
    let given = MODEL.tokenizer.encode_first(QUESTION).unwrap();
    assert_eq!((first.cached_tokens, first.new_tokens), (0, given.len()));
    assert_eq!(session.prompt_tokens(), given);
    let second = prompt(&mut session, NEXT, 20);
    let more = MODEL.tokenizer.encode_more(NEXT).unwrap();
    // The last token that was generated has not been read yet.
    assert_eq!(second.cached_tokens, given.len() + 19);
    assert_eq!(second.new_tokens, 1 + more.len());
    assert_eq!(session.cache().len(), session.tokens().len() - 1);

    let whole = [given, first.generated.tokens, more].concat();
    assert_eq!(session.prompt_tokens(), whole);
    let mut afresh = plain();
    let answer = afresh.complete(whole, &tokens(20), &mut silent).unwrap();
    assert_eq!(answer.cached_tokens, 0);
    assert_eq!(answer.generated.tokens, second.generated.tokens);
}

#[test]
fn a_conversation_reads_only_its_new_messages() {
    let mut session = conversation();
    let first = prompt(&mut session, QUESTION, 20);
    let second = prompt(&mut session, NEXT, 20);
    assert_eq!(second.cached_tokens, first.new_tokens + 19);
    assert!(second.new_tokens < 30, "{}", second.new_tokens);
    let roles: Vec<&str> = session.messages().iter().map(|m| m.role()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(session.messages()[3].content(), second.generated.text);

    // A server is given all messages again each time.
    let mut stateless = conversation();
    let messages = session.messages().to_vec();
    for (end, expected) in [(1, &first), (3, &second)] {
        let given = messages[..end].to_vec();
        let answer = stateless.converse(given, &tokens(20), &mut silent).unwrap();
        assert_eq!(answer.cached_tokens, expected.cached_tokens);
        assert_eq!(answer.generated.tokens, expected.generated.tokens);
    }
    assert_eq!(stateless.messages(), messages);
}

#[test]
fn the_message_of_the_system_comes_first() {
    let mut session = conversation();
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let template = ChatTemplate::parse(source, Vec::new()).unwrap();
    session = session.with_chat(template, Some("Count."));
    prompt(&mut session, "One, two,", 1);
    let text = MODEL.tokenizer.decode(session.prompt_tokens()).unwrap();
    assert_eq!(text, "system: Count.\nuser: One, two,\n");
}

/// No cache can be rewound: what differs from it, or ends within it, is read again from the start.
#[test]
fn a_changed_history_starts_again() {
    let mut session = conversation();
    let first = prompt(&mut session, QUESTION, 20);
    prompt(&mut session, NEXT, 20);
    for messages in [
        vec![Message::new("user", QUESTION)],
        vec![
            Message::new("user", QUESTION),
            Message::new("assistant", " I do not know."),
            Message::new("user", NEXT),
        ],
    ] {
        let mut afresh = conversation();
        let expected = afresh.converse(messages.clone(), &tokens(20), &mut silent);
        let expected = expected.unwrap();
        let answer = session.converse(messages, &tokens(20), &mut silent);
        let answer = answer.unwrap();
        assert_eq!(answer.cached_tokens, 0);
        assert_eq!(answer.new_tokens, expected.new_tokens);
        assert_eq!(answer.generated.tokens, expected.generated.tokens);
        assert_eq!(session.messages(), afresh.messages());
        assert_eq!(session.cache().len(), session.tokens().len() - 1);
    }
    // The prompt alone, all of which the cache holds.
    let again = conversation().prompt(QUESTION, &tokens(1), &mut silent);
    assert_eq!(again.unwrap().generated.tokens, first.generated.tokens[..1]);
    let mut session = conversation();
    for _ in 0..2 {
        let messages = vec![Message::new("user", QUESTION)];
        let answer = session.converse(messages, &tokens(1), &mut silent);
        assert_eq!(answer.unwrap().cached_tokens, 0);
    }
}

#[test]
fn a_seed_gives_the_same_tokens() {
    let drawn = |seed| {
        let mut session = session(EXACT, hot(seed));
        let first = prompt(&mut session, QUESTION, 15).generated.tokens;
        [first, prompt(&mut session, NEXT, 15).generated.tokens]
    };
    assert_eq!(drawn(3), drawn(3));
    assert_ne!(drawn(3), drawn(4));
    // Also where a session has drawn others before.
    let mut session = session(EXACT, hot(4));
    prompt(&mut session, QUESTION, 15);
    session.clear().unwrap();
    assert!(session.tokens().is_empty() && session.cache().is_empty());
    session.set_sampling(hot(3)).unwrap();
    let first = prompt(&mut session, QUESTION, 15);
    let second = prompt(&mut session, NEXT, 15);
    let both = [first.generated.tokens, second.generated.tokens];
    assert_eq!(both, drawn(3));
}

#[test]
fn a_saved_session_goes_on_to_the_same_tokens() {
    const CACHE: &str = "lexico:window=8,batch=4,sparsity=4";
    let folder = tempfile::tempdir().unwrap();
    let [part, whole] = ["part", "whole"].map(|name| folder.path().join(name));
    let mut first = session(CACHE, hot(5));
    prompt(&mut first, QUESTION, 18);
    first.check_save(&part).unwrap();
    let bytes = first.save(&part).unwrap();
    assert_eq!(std::fs::metadata(&part).unwrap().len(), bytes as u64);

    let mut second = session(CACHE, hot(5));
    let saved = SavedGeneration::open(&part).unwrap();
    second.resume(saved).unwrap();
    assert_eq!(second.tokens(), first.tokens());
    assert_eq!(second.prompt_tokens(), first.prompt_tokens());
    for session in [&mut first, &mut second] {
        let answer = go_on(session, 12);
        assert_eq!(answer.new_tokens, 1);
        prompt(session, NEXT, 6);
    }
    assert_eq!(second.tokens(), first.tokens());
    first.save(&whole).unwrap();
    second.save(&part).unwrap();
    let files = [part, whole].map(|path| std::fs::read(path).unwrap());
    assert_eq!(files[0], files[1]);
}

#[test]
fn another_seed_draws_from_its_start() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    let mut first = session("lexico", hot(5));
    prompt(&mut first, QUESTION, 5);
    first.save(&file).unwrap();
    let drawn = |draws: usize| {
        let mut session = session("lexico", hot(6));
        for _ in 0..draws {
            session.clear().unwrap();
            prompt(&mut session, QUESTION, 1);
        }
        session
            .resume(SavedGeneration::open(&file).unwrap())
            .unwrap();
        go_on(&mut session, 10).generated.tokens
    };
    assert_eq!(drawn(0), drawn(2));
}

#[test]
fn a_saved_conversation_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    let chat = |session: Session| {
        let source = "{% for message in messages %}{{ message.content }}{% endfor %}";
        session.with_chat(ChatTemplate::parse(source, Vec::new()).unwrap(), None)
    };
    let mut session = chat(session_of_codes());
    let first = prompt(&mut session, QUESTION, 10);
    session.save(&file).unwrap();
    let mut resumed = chat(session_of_codes());
    resumed
        .resume(SavedGeneration::open(&file).unwrap())
        .unwrap();
    assert_eq!(resumed.messages(), session.messages());
    let rest = go_on(&mut resumed, 10);
    let answer = &resumed.messages()[1];
    assert_eq!(answer.role(), "assistant");
    assert_eq!(
        answer.content(),
        first.generated.text + &rest.generated.text
    );
    let next = prompt(&mut resumed, NEXT, 5);
    assert!(next.cached_tokens > first.new_tokens);
    assert_eq!(resumed.messages().len(), 4);
}

fn session_of_codes() -> Session {
    session("lexico:window=8,batch=4", Sampling::default())
}

/// What the callback stops is as if it had stopped by itself.
#[test]
fn a_stopped_generation_goes_on() {
    let mut whole = session_of_codes();
    let expected = prompt(&mut whole, QUESTION, 20).generated;
    let mut session = session_of_codes();
    let (mut calls, mut text) = (0, String::new());
    let mut stop = |piece: &str| {
        calls += 1;
        text.push_str(piece);
        match calls {
            7 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let answer = session.prompt(QUESTION, &tokens(20), &mut stop).unwrap();
    assert_eq!(answer.generated.finish, Finish::Interrupted);
    assert_eq!(answer.generated.tokens, expected.tokens[..7]);
    assert_eq!(answer.generated.text, text);
    let rest = go_on(&mut session, 13).generated;
    assert_eq!(rest.tokens, expected.tokens[7..]);
    assert_eq!(text + &rest.text, expected.text);
    assert_eq!(session.tokens(), whole.tokens());
}

#[test]
fn nothing_follows_a_text_that_has_ended() {
    let mut session = plain();
    let options = GenerateOptions {
        stop: vec!["\n\n".to_owned()],
        ..GenerateOptions::default()
    };
    let question = format!("{QUESTION}\nAnswer:");
    let answer = session.prompt(&question, &options, &mut silent).unwrap();
    let finish = answer.generated.finish;
    assert!(matches!(finish, Finish::End | Finish::Stop), "{finish:?}");
    let held = session.tokens().to_vec();
    let nothing = session.go_on(&options, &mut silent).unwrap().generated;
    assert_eq!((nothing.tokens.len(), nothing.finish), (0, finish));
    assert_eq!(session.tokens(), held);
    assert!(!prompt(&mut session, NEXT, 4).generated.tokens.is_empty());
}

#[test]
fn what_is_new_of_a_text_is_what_follows_the_text_so_far() {
    let mut session = plain();
    assert_eq!(session.new_part(QUESTION).unwrap(), QUESTION);
    let answer = prompt(&mut session, QUESTION, 8).generated.text;
    let whole = format!("{QUESTION}{answer}{NEXT}");
    assert_eq!(session.new_part(&whole).unwrap(), NEXT);
    assert_eq!(session.new_part(NEXT).unwrap(), NEXT);
}

/// A prompt that is refused, or that fails half way, costs neither the text nor later answers.
#[test]
fn errors_leave_the_text_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    let mut undisturbed = session_of_codes();
    let mut session = session_of_codes();
    let empty = session.go_on(&tokens(5), &mut silent);
    assert!(matches!(empty, Err(Error::EmptyPrompt)));
    assert!(matches!(session.save(&file), Err(Error::File { .. })));
    let expected = prompt(&mut undisturbed, QUESTION, 10);
    assert_eq!(
        prompt(&mut session, QUESTION, 10).generated.tokens,
        expected.generated.tokens
    );
    let small = GenerateOptions {
        context: 30,
        ..tokens(5)
    };
    let refused = session.prompt(NEXT, &small, &mut silent);
    assert!(matches!(refused, Err(Error::ContextFull { .. })));
    let refused = session.converse(Vec::new(), &tokens(5), &mut silent);
    assert!(matches!(refused, Err(Error::Chat(_))));
    let expected = prompt(&mut undisturbed, NEXT, 10);
    let answer = prompt(&mut session, NEXT, 10);
    assert_eq!(answer.cached_tokens, expected.cached_tokens);
    assert_eq!(answer.generated.tokens, expected.generated.tokens);

    let mut session = plain();
    let mut undisturbed = plain();
    for session in [&mut session, &mut undisturbed] {
        prompt(session, QUESTION, 10);
    }
    let outside = [session.tokens(), &[u32::MAX]].concat();
    let failed = session.complete(outside, &tokens(5), &mut silent);
    assert!(matches!(failed, Err(Error::TokenOutside { .. })));
    assert_eq!(session.tokens(), undisturbed.tokens());
    assert!(matches!(session.save(&file), Err(Error::File { .. })));
    assert!(!file.exists());
    let expected = prompt(&mut undisturbed, NEXT, 10);
    let answer = prompt(&mut session, NEXT, 10);
    assert_eq!(answer.cached_tokens, 0);
    assert_eq!(answer.generated.tokens, expected.generated.tokens);
}

#[test]
fn a_conversation_does_not_go_on_from_plain_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    let mut plain = session("lexico", Sampling::default());
    prompt(&mut plain, QUESTION, 3);
    plain.save(&file).unwrap();
    let mut session = conversation();
    session
        .resume(SavedGeneration::open(&file).unwrap())
        .unwrap();
    assert_eq!(session.spec().method().name, "lexico");
    let refused = session.prompt(NEXT, &tokens(3), &mut silent);
    assert!(matches!(refused, Err(Error::PlainText)));
}

#[test]
fn sessions_may_move_between_threads() {
    let mut session = plain();
    let worker = std::thread::spawn(move || prompt(&mut session, QUESTION, 2));
    assert_eq!(worker.join().unwrap().generated.tokens.len(), 2);
}

/// What fits the memory is as it is without codes; the less there is, the more becomes codes, and it is never exceeded.
#[test]
fn positions_become_codes_as_memory_fills() {
    let text = QUESTION.repeat(30);
    let mut full = session("full", Sampling::default());
    let expected = prompt(&mut full, &text, 40).generated;
    let positions = full.cache().len();
    let need = MODEL.decoder.config().fp16_cache_bytes(positions);
    let mut dense = Vec::new();
    for share in [1.5, 1.0, 0.5, 0.25] {
        let bytes = (need as f64 * share) as usize;
        let spec = format!("lexico:batch=4,memory={bytes}B");
        let mut limited = session(&spec, Sampling::default());
        let answer = prompt(&mut limited, &text, 40).generated;
        let held = limited.cache().footprint().total();
        assert!(held <= bytes, "{held} of {bytes}");
        assert_eq!(limited.cache().len(), positions);
        if share > 1.0 {
            assert_eq!(answer.tokens, expected.tokens);
        }
        dense.push(limited.cache().dense().unwrap());
    }
    assert_eq!(dense[0], positions);
    assert!(dense.is_sorted_by(|a, b| a > b), "{dense:?}");

    // Where even codes do not fit.
    let bytes = need / 4;
    let mut small = session(
        &format!("lexico:batch=4,memory={bytes}B"),
        Sampling::default(),
    );
    let capacity = small.cache().capacity().unwrap();
    let refused = small.prompt(&QUESTION.repeat(120), &tokens(5), &mut silent);
    assert!(
        matches!(refused, Err(Error::MemoryFull { capacity: own, .. }) if own == capacity),
        "{refused:?}"
    );
    let answer = prompt(&mut small, &text, 10_000).generated;
    assert_eq!(answer.finish, Finish::ContextFull);
    let most = capacity.min(MODEL.decoder.config().context);
    assert_eq!(small.cache().len(), most);
    assert!(small.cache().footprint().total() <= bytes);
}
