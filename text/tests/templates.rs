//! Templates as models bring them give the same text with the guards as without.
#![allow(clippy::unwrap_used)]

use minijinja::{Environment, Error, context};
use std::path::Path;
use unmask_text::{Message, Tokenizer};

/// As of SmolLM2 and other models that use ChatML.
const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// With what the Qwen3 family uses: a reversed list, a namespace, thoughts cut out.
const THINKING: &str = "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- '# Tools' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == \"assistant\" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- call.name }}{%- endfor %}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == \"tool\" and (loop.first or messages[loop.index0 - 1].role != \"tool\") %}{{- content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}";

/// With what the Llama 3 and Mistral families use: a system message taken off, alternating roles, a macro.
const HEADERS: &str = "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{{- header('system') + 'Today Date: ' + date_string + '\\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{%- set odd = true %}{%- endif %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- header(message['role']) + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}{{- users | length ~ '/' ~ rest | map(attribute='role') | join(',') }}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}";

/// Filters, methods and operators that models' templates use now and then.
const ASSORTED: &str = "{% set ns = namespace(text='', list=[], is_first=false) %}\
    {% for m in messages %}{% set ns.text = ns.text ~ m.content|upper ~ (m.content|length) %}\
    {% set ns.list = ns.list + [m] %}{% set ns.is_first = not ns.is_first %}\
    {% if loop.previtem is defined and loop.previtem.role == m.role %}{{ raise_exception('same') }}{% endif %}\
    {{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}{{ ns.text }}{{ ns.list | tojson }}\
    {{ {'b': 1, 'a': [1.5, none, true, 'é']} | tojson(indent=2) }}{{ dict(a=1, b='x') | items | list }}\
    {{ {'k': 'v'}.items() | list }}{{ {'k': 'v'}.get('k') }}{{ {'k': 'v'} | dictsort }}{{ {'k': 1}.keys() | list }}\
    {{ 'a,b,c'.split(',', 1) }}{{ 'a b' | title }}{{ ['x', 'y'] | join('-') }}{{ ','.join(['p', 'q']) }}{{ range(2, 8, 3) | list }}\
    {{ messages[-1].content[:3] }}{{ messages[1].content[-2:] }}{{ [3, 1, 2] | sort }}{{ [3, 1, 3] | unique | list }}\
    {{ (messages | first).role }}{{ (messages | last).role }}{{ undefined_thing | default('d') }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 1 < 2 <= 2 }}\
    {% set a, b = [1, 2] %}{{ a }}{{ b }}{{ 'x' in 'xyz' }}{{ 'q' not in ['r'] }}{{ ['a', 'b'] | map('upper') | list }}\
    {% set caught %}{{ a }}-{% filter lower %}ABC{% endfilter %}{% endset %}{{ caught }}{{ 'aXbX' | replace('X', '--') }}{{ 'aXbX'.replace('X', '') }}\
    {% for k, v in {'one': 1, 'two': 2} | items %}{{ k }}={{ v }}{% if not loop.last %}, {% endif %}{% else %}none{% endfor %}\
    {% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}\
    {% macro m(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}{{ m(1, y=2) }}{% call m(3) %}in{% endcall %}\
    {% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}<{{ loop(x) }}>{% else %}{{ x }}{% endif %}{% endfor %}\
    {{ 'yes' if messages is iterable and messages is not mapping }}{{ '5' | int + 1 }}{{ 3.7 | round }}{{ 'abc' | reverse }}{{ 'abc'[1] }}{{ ' a ' | trim }}";

fn messages(count: usize) -> Vec<Message> {
    let said = [
        "You are kind.\n",
        " Hi <there>, what's 1 + 1? é漢😀",
        "<think>\nhm\n</think>\n\nTwo.",
        "",
        "a, b",
        "x' \"y\"",
    ];
    (0..count)
        .map(|i| {
            let role = if i == 0 { "system" } else { ["assistant", "user"][i % 2] };
            Message { role: role.into(), content: said[i % said.len()].into() }
        })
        .collect()
}

/// What the engine gives without guards.
fn plain(source: &str, messages: &[Message]) -> String {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(minijinja::ErrorKind::InvalidOperation, message))
    });
    let values = context! { messages, add_generation_prompt => true, bos_token => "<s>", eos_token => "</s>" };
    environment.render_str(source, values).unwrap()
}

/// A tokenizer that gives text back as it was, with a template.
fn load(source: &str) -> Result<Tokenizer, String> {
    let json =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama/tokenizer.json")).unwrap();
    let config = br#"{ "bos_token": "<s>", "eos_token": "</s>" }"#;
    Tokenizer::from_files(&json, Some(config), Some(source)).map_err(|error| error.to_string())
}

fn guarded(source: &str, messages: &[Message]) -> Result<String, String> {
    let tokenizer = load(source)?;
    let ids = tokenizer.encode_chat(messages).map_err(|error| error.to_string())?;
    Ok(tokenizer.decode(&ids, false))
}

#[test]
fn real_templates_give_what_they_give_without_guards() {
    for (name, source) in [("chatml", CHATML), ("thinking", THINKING), ("headers", HEADERS), ("assorted", ASSORTED)] {
        for count in 2..7 {
            let messages = messages(count);
            let result = guarded(source, &messages).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(result, plain(source, &messages), "{name}");
        }
    }
}

#[test]
fn long_conversations_stay_within_the_limits() {
    let mut long = messages(2000);
    long[1].content = "word ".repeat(400_000);
    for source in [CHATML, THINKING, HEADERS] {
        let rendered = guarded(source, &long).unwrap();
        assert!(rendered.len() > 2_000_000, "{}", rendered.len());
    }
}

#[test]
fn what_nothing_guards_is_refused_when_it_is_loaded() {
    let elifs = format!("{{% if x %}}{}{{% endif %}}", "{% elif x %}".repeat(200));
    for (source, why) in [
        ("{{ 'x' * 9 }}", "line 1 has a `*`"),
        ("\n{{ 2 ** 9 * 3 }}", "line 2 has a `*`"),
        ("{% include 'x' %}", "other templates"),
        ("{% block a %}{% endblock %}", "other templates"),
        ("{% autoescape true %}{% endautoescape %}", "escapes"),
        (&format!("{{{{ x{} }}}}", "()".repeat(400)), "512 words"),
        (elifs.as_str(), "128 elif"),
        (&"x".repeat(300 << 10), "longer than"),
    ] {
        let error = load(source).err().unwrap();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn the_error_says_what_there_was_too_much_of() {
    let doubling = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let error = guarded(doubling, &messages(2)).unwrap_err();
    let bytes: usize = messages(2).iter().map(|message| message.role.len() + message.content.len()).sum();
    let limit = (32 << 20) + 64 * bytes;
    assert_eq!(error, format!("chat template: makes more than {limit} bytes of values"));
}
