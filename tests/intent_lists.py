"""Two lists of messages: what asks for words, and what asks for a picture.

Over 600 each, written after the prompts of evaluation kits and how people talk to a chat with pictures. The rules were
mended with them. At first sight, of four times sixty messages of each kind, the questions chosen to look like wishes,
9 % were drawn and 18 % answered before; of the last sixty 8 % and 5 %. Of three lists more (102, 65, 36 questions; 80,
60, 50 wishes) 3, 3 and 8 % were drawn, 12, 18 and 6 % answered. Every message stands for itself. Questions are
asked with a picture at hand and without, those with "-" without; wishes have one where they begin with "+".
"""

QUESTIONS = [
    line.strip()
    for line in """
What is this?
What color is the background?
How many stars are there?
Is there a dog in the picture?
Describe the picture.
Describe this image in detail.
Give me a description of this image.
Give a short and clear explanation of the subsequent image.
Color of the background?
Give a very brief answer. What is this?
Give best answer to the following question. What does the man hold?
Generate a caption for this image.
Create a dense caption of the image.
Write a detailed description of the given image.
Convert the table in the image to markdown.
Convert the table to markdown
Draw a conclusion from the chart
Draw conclusions about the trend shown here.
Please generate a step by step answer, include all your intermediate reasoning process.
Fill in the blank: the dog is ___ the car.
Make a list of the objects
Put differently, what is this?
Change in revenue between 2019 and 2020?
Create a markdown table from the image.
Imagine you are a doctor. What do you see?
Imagine you are blind and I describe this to you. What would you ask first?
Generate the LaTeX code for this formula
Double check the number of stars
Just give the letter of the option.
Can you give a short introduction to this painting?
Can you make out what the sign says?
Could you tell me what kind of car this is?
Can you see a cat?
Can you describe the colors?
Would you call this a photo or a drawing?
Is this image a painting or a photograph?
Which of the two is larger, the star or the moon?
Who painted this picture?
Where is the dog?
When was this photo taken?
Why is the sky red here?
Name the animals in the picture.
Count the yellow stars.
List all objects with their colors.
Identify the object on the left.
Read the text in the image.
Transcribe the handwriting.
Translate the sign into English.
Summarize the image in one sentence.
Make a summary of this chart.
Turn the chart into a table.
Turn this image into a short story.
Turn the recipe in the photo into a shopping list.
Write a poem about this picture.
Write a haiku about the sunset in the photo.
Create a story about the dog.
Generate a title for this photo.
Generate five questions about the image.
Make up a name for this character.
Give three adjectives for the mood.
Give me the number of cars.
Give me the coordinates of the red car as a bounding box.
Give the bounding box of the dog.
Output the answer as JSON.
Create a JSON object with the colors and counts.
Generate alt text for this image.
Create alt text for a blind reader.
Make a guess: what will happen next?
Make sense of this picture for me.
Add up the numbers in the picture.
Add the two numbers shown.
Set up the equation for this triangle.
Show me how you know that.
Show your reasoning step by step.
Show me where the dog is.
Tell me about this image.
Tell me a joke about cats.
Explain the joke in this picture.
Explain what is drawn on the left.
Compare the two pictures.
Paint me a verbal portrait of what you see.
Sketch out in words what is going on here.
Illustrate your answer with an example from the chart.
Move on: what is the second object?
Place the events in order and answer with the letters.
Swap thoughts with me: what do you like about it?
Remove ambiguity: is the star left or right of the moon?
Replace the blank with the right word: the star is ____.
Put the answer in a single word: what color is the car?
Set aside the colors. How many shapes are there?
Crop yields rose in which year according to the chart?
Draw a comparison between the two charts.
Draw an analogy between this picture and a novel.
Draw my attention to anything unusual.
Picture this: you are the owner. What would you do first?
Picture quality: good or bad?
Image type: photo or drawing?
Photo or painting?
Left or right?
Red or blue?
Yes or no: is there a tree?
True or false: the image shows two dogs.
Answer the question using a single word or phrase. What is in the corner?
Answer with the option's letter from the given choices directly. A. cat B. dog
What is the color of the car? A. red B. blue C. green Answer with the option's letter.
Question: How many dogs are there? Options: A. one B. two. Please select the correct answer.
Hint: Please answer the question and provide the final answer at the end. Question: How many objects are left?
Is the following statement correct? The dog is left of the cat.
A man is holding an umbrella. What color is it?
A chart is shown. What was the highest value?
An image is given. Does it contain text?
Two stars and a moon are shown. Which one is larger?
The picture shows a city. Which one?
In the picture, what is above the star?
In one word, what is this?
Based on the image, what season is it?
According to the chart, which year was best?
Looking at the picture, how would you describe the mood?
I want to know what this is.
I need a description of this picture for my blog.
I'd like to know how many people are here.
I would like an explanation of the chart.
I want you to describe the scene.
I have a question about this picture.
Let me know what you see.
Help me understand this diagram.
Do you see any animals?
Does the image contain a face?
Are there more stars than moons?
Was this taken at night?
Should I change the background color?
Should I draw a bigger star?
How do I draw a cat?
How can I change the background of a photo?
How would you paint this scene?
What would you change about this picture?
What happens if I remove the red block?
What does the word "draw" mean?
Why did you make it blue?
Did you change the background?
Did you draw the star on the left?
What did you draw?
What is an edit?
Generate a one sentence description
Put the events in chronological order
Create an itinerary from this map
Convert this to text
Turn this into a tweet
give me your opinion
Give me the time shown on the clock
Add a caption to this image
Fill in the form
Set a price for this item
Name a color
Show me the largest number
Show me all red objects
Make a prediction
Make a diagnosis from the x-ray
Create a lesson plan
Create a prompt that would generate this image
Generate a prompt for Midjourney
Draw up a contract
Paint a picture in words
Give the total
Give an estimate of the height
Generate a rating
Provide a one-sentence caption for the provided image.
Give the difference between the two bars
Render a verdict on this outfit
Sketch the plot of this movie in a few words
Draw inferences from the graph
Change the subject: tell me about dogs
Make me laugh
Give me a break down of the chart
Give a rough idea of the size
Turn the diagram into pseudocode
Convert the graph to mermaid syntax
Make an inventory of the room
Give me some background on this painting
Add context to the picture
Create a persona for this person
Generate SEO keywords for this product photo
Give me the hex code of the background
make a haiku
Show me the steps to solve it
Place the correct option
Set the scene for me in two sentences
Move through the picture from left to right and name what you see
Color?
Colors in the image
Two things you notice
Another question: what is behind the car
An animal or a plant
Imagine this was a movie. Title it.
the dog is what breed
A or B
One last question about the image
Some people say it is fake. True?
a short answer please
the answer
Three facts about this animal
- What is the capital of France?
- Hello
- Hi, how are you?
- Thanks!
- Thank you, that is all.
- ok
- Write a poem about spring.
- Generate a list of ten animals.
- Create a short story about a dragon.
- Make a plan for my week.
- Give me a recipe for pancakes.
- Give me an idea for a birthday present.
- Show me a regular expression for email addresses.
- Show me an example of recursion in Python.
- Generate Python code for quicksort.
- Create a title and tags for this chat in JSON.
- ### Task: Generate a concise, 3-5 word title with an emoji summarizing the chat history.
- Suggest 3-5 relevant follow-up questions or prompts.
- A quick question before we start.
- An answer in one sentence, please.
- What can you do?
- What does the <img> tag do in HTML?
Hint: Please provide the correct option letter, e.g., A, B, C, D, at the end. Question: Which number is missing?
Is the following statement about the image true? The cat sits on the mat. Please answer yes or no.
Subtract all tiny shiny balls. Subtract all purple objects. How many objects are left?
According to the question shown in the image, please directly answer the question and provide the final value.
Give a one-sentence summary of the chart.
Please provide the bounding box coordinate of the region this sentence describes: man in blue shirt.
What is written at the top of the page?
OCR this image please
Extract every line item from this receipt as JSON
Turn this whiteboard photo into meeting notes
Convert this handwritten page to plain text
Make a short story out of this picture
Create alt text for this photo
Write a product description for the shoes in the photo
Add up the numbers in the second column
Change 72 degrees Fahrenheit to Celsius
Set a reminder for tomorrow at 9
Place the following events in order: moon landing, fall of the Berlin Wall, first iPhone
Put this into one paragraph.
Move on to the next question
Remove the duplicates from this list: a, b, a, c
Draw up a packing list for Iceland
Paint a verbal portrait of the main character
Show your work.
Show me how to tie a bowline
Show the steps to solve x^2 = 16
Generate five names for a coffee shop
Generate a regex that matches dates
Create a unit test for this function
Create a 3-day workout plan
Design a database schema for a library
Make sense of this error message
Give me three reasons to visit Lisbon
Give me the hex code of the wall
Get me the phone number on the sign
I want to know who is in this picture
I need help with my homework
I'd like an explanation of the joke in this meme
Let me know whether the light is on
Let's talk about cats
Can I see through this window or is it frosted
Can you generate a title for this conversation
Could you create a caption in Spanish
Imagine the next frame. What happens?
Illustrate your reasoning step by step.
Sketch out an argument against this claim
Render a verdict: is this dish overcooked?
Visualize this data as an ASCII table
hello there
thanks, that's great
what can you do
tell me about the picture
the sky, what colour
how does it look
who made you
is it a boy or a girl
and the one on the left
Suggest 3-5 relevant follow-up questions or prompts that the user might ask next
Create a concise, 3-5 word title with an emoji summarizing the chat history.
Please answer directly with only the letter of the correct option and nothing else.
Does this artwork exist in the form of painting? Please answer yes or no.
Is there a red traffic light in this image? Answer with yes or no
In the image, there is a table with a laptop. What brand is it?
Which mood does this image convey? A. cosy B. angry C. sad D. anxious
Identify the question that the given ad is meant to answer.
Offer a succinct explanation of the picture presented.
Present a compact description of the photo's key features.
Provide a short description for this region.
Locate the phrase a man in a red hat and answer with a bounding box.
Image: table. Task: sum the second column.
Extract the total amount from the invoice
Pull the dates out of this letter
Rewrite the sign so it sounds friendlier
Change this sentence to past tense: he runs fast
Change the tone of this email to formal
Make this shorter
Make it more concise
Make this paragraph sound professional
Make a note of what you see
Make a comparison table of these two phones
Make a prediction about the weather here
Give me an overview of the diagram
Give a title to this painting
Give me a breakdown of the calories in this meal
Give me more detail about the bridge
Give me a hint
Give me feedback on my drawing
I want a short caption for instagram
I want to book a flight
I'd like to improve this photo, what settings should I use
I would like some advice on my garden
I need an idea for dinner
I need to write a letter to my landlord
Show me the code for a binary search
Show me a good way to cook salmon
Show how the force acts on the block
Let's see if you can solve this riddle
Let me see what you can do
Create a docker compose file for postgres
Create a study schedule for finals
Create a function that reverses a string
Create a character backstory for my elf rogue
Generate a random number between 1 and 10
Generate a summary of the slides
Generate a cover letter for this job
Design a marketing campaign for a coffee brand
Design an experiment to test gravity
Draw the conclusion that follows logically
Draw a parallel between Rome and Byzantium
Draw on your knowledge of physics to explain the rainbow
Imagine that you are a travel guide and describe this place
Illustrate how photosynthesis works in simple terms
Add a docstring to the function
Remove the stop words from my sentence
Translate to French: the red car is fast
red flags in this contract
a word that rhymes with orange
the name of this bird
good morning
Based on the following comic, which of the options best describes the author's attitude? Answer with the letter.
Question: What is the value of x? Choices: (A) 12 (B) 15 (C) 18. Answer:
Is the word in the logo "apple"? Please answer yes or no.
What is the genre of this book? Answer the question with detailed reason.
Can you infer where this was photographed?
Could this be a wolf?
Describe the differences between the two images as JSON with keys added and removed.
Find all the text on the poster
Point to the largest bottle
How would the scene change if it rained?
Using the map, name the northernmost city
Give a caption
Give the color and the shape of every object
Give me a list with everything on the shelf
Give me a rough count of the people
Give me two adjectives
Get the time from the clock
Get the main colors as hex values
Make an educated guess about the age
Make an estimate of the distance
Make a table with columns for name and price
Make a recipe from what is in the fridge
Create a quiz about this diagram
Create captions for each panel
Create a table of contents
Create an email to my boss
Create a small program in C
Generate a bullet list of the features
Generate an answer to the riddle
Generate html for this mockup
Generate a caption in the style of Hemingway
Generate flashcards from the page
Design a prompt for a text-to-image model
Turn it into a list
Turn the sketch into HTML
Turn the numbers into percentages
Convert the amounts to euros
Change the units to metric
Set the equation equal to zero and solve
Move the decimal point two places and tell me the number
Put this in simpler terms
Put the steps in order
Add a sentence about the weather
Add the prices
Remove jargon from the explanation
Replace every adjective in the caption
Show the answer only
Show me the formula
Show me an easy proof
I want an answer in one word
I want a summary
I want you to act as a travel agent
I'd like a second opinion on this x-ray
I need three synonyms for happy
Let me ask about the man in red
Draw your own conclusions and tell me
Paint a picture of life in the trenches in your own words
Picture a triangle with sides 3, 4 and 5. What is its area?
white wine or red with fish
Write SVG code of a circle
What is the name of the colony shown? A. Maryland B. New Hampshire Answer with the option letter only.
Which of these states is farthest north?
Is this person male or female?
Is the dog in front of the cat in the image?
What number is printed on the jersey? Keep the answer short.
Judge whether the sentence fits the picture: a man is surfing
Explain why this meme is funny
Caption this
Describe what the woman on the left is holding in detail.
Solve the equation on the blackboard
Write alt text
Read out the plate number
Spot the mistake in the drawing
List the ingredients
Rank these from smallest to largest
Estimate the calories
Guess the city
Check whether the code compiles
Compare A and B
Give me your honest review of this logo
Give me instructions to assemble this
Give me a score out of ten
Give an example of a mammal
Make a haiku out of the scene
Make a timeline of the events in the text
Make a budget from these receipts
Make up a backstory for the cat
Make the case for buying a bike
Create an outline for my talk
Create a checklist from this manual page
Create a hashtag for this picture
Create a rhyme about the duck
Generate a description for the visually impaired
Generate ten interview questions
Generate a JSON schema from this form
Generate a headline for the photo
Design a game plan for our match
Design a meal plan for a runner
Show me the way to the exit on this map
Show me what is wrong in line 3
Show the numbers behind this chart
Turn my notes into a speech
Convert the date to ISO format
Translate this menu
Change my mind about pineapple pizza
Set a good password policy
Add punctuation to this text
Remove the accents from this string: café
Replace x by 3 and compute y
Move the sentence to the end
Draw the line between fact and opinion here
Draw lessons from the story
Sketch a proof that root two is irrational
Render this as markdown
Picture this from the dog's view. What does it think?
Paint a clear picture of the risks for me
I would like to understand this chart
I want to learn how to draw a cat
You are a helpful assistant. Answer briefly.
ok and who is the second one
what's this
who is in the photo
is it raining there
count the stars
how much is the bill
transcribe the text
read the sign
translate the sign to English
explain the joke
rate this picture
what would you change
tell me the time shown
identify the plant
compare the two objects
make a list of colours
give me three tags for this
write alt text
suggest a better composition
draw attention to any defects
paint me a picture in words
make sense of this diagram
make out the letters on the plate
add up the numbers on the receipt
remove doubt: is that a cat?
name the object to the left
which one's bigger
do you see a dog or a cat
create a caption
generate a short description
generate 5 hashtags
produce an inventory of objects
turn this into a recipe
convert this table into csv
color of the car
colour scheme?
number of stars
position of the ball
estimate her age
locate the cat
find the cat
point out the differences
describe
description please
summary
ocr
caption this
what do you think of it
is this picture generated by ai
show your reasoning
can you draw any conclusions
draw a parallel between the two
design flaws in this?
make an educated guess about the place
give the bounding box of the car
add a title for this photo
fill in the blanks on this form
extract all dates
list everything red
show the total
give me the gist
break this down for me
solve the equation in the picture
walk me through this chart
turn the chart into words
change log of the two versions?
what colour would the background be if inverted
give it a name
make up a story about it
create a quiz from this slide
draw up a contract from this
paint the scene with words
sketch the plot in two sentences
highlight the main points
put this into plain English
replace jargon with plain words
remove ambiguity from this sentence: he saw her duck
make it make sense
add context to this picture in a sentence
write code to draw this
generate python code for this chart
create a table of the items
produce json of the receipt
show me the text only
help me understand this
is the red car faster
blue or green?
true or false: there are two cats
yes or no: is it day
how many, and which colors
where was this taken
what breed
why so dark?
how old
the capital of France
tell me a joke
who are you
thanks
nice
ok
wow great job
what's written on the shirt
tell me more
is that your final answer
can you zoom in on the details and tell me what they say
what's the vibe
which season
guess the country
caption it for instagram
give me a witty one-liner about this
write a limerick about the cat
make a haiku out of this
create an ad copy for this product
generate a product description
turn this chart into bullet points
draw your conclusion
sketch the argument
paint with a broad brush what happened
make a comparison with the first image
add 3 and 5
remove stop words from this: the cat sat
replace all commas with semicolons in my text
change my mind
move on
set the scene in one paragraph
fill me in
show me the steps to solve it
show that x is even
give an example
let me know what you see
let it be known what the sign says
a quick question about the image
a question
two questions
three reasons why this works
an explanation please
the name of this flower
names of all animals
the difference between both
any people here
anything unusual
are you sure
what about the second one
how about the left one
and the background
and its color
why
really
hmm
thank you so much
can you see a cat
do you know this place
please check the spelling
proofread the sign
grade this essay
mark the wrong answers
name three things you see
compute the area
find x
use this picture to answer: is it day
put the steps in order
put it in a table
make the table again but shorter
turn it into json
is it edited
whats in this pic
how come it is so bright
tell me which one is taller
does it have wheels
spell the word on the sign
any text in there
write a short bedtime tale about this
in which city is this
make a short list of what is here
explain like i'm five
do a quick analysis
draw a distinction between these two
give a brief overview
state the obvious
show all the text
change of plans: what is this
put yourself in his shoes
paint a picture of life in 1900 using words
add your opinion
take a guess
take a look at this
turn around time for delivery?
remove the noise from my argument
color codes used here
switch topics
let me think
cover the main points
dress code in this picture?
set a reminder
exchange rate today
can we have a chat
no idea what this is
the more the merrier
the answer more precisely
another question
a better answer please
""".strip().splitlines()
]

WISHES = [
    line.strip()
    for line in """
draw three yellow stars
Draw a cat
please draw me a picture of a blue car
Draw me a dog.
Can you draw a house?
Could you please draw two green trees and a sun?
could you generate an image of two dogs?
Generate an image of a castle at night.
Generate a picture with a red bus on the left and a boat on the right.
generate a panda
Generate an image: a red house
create an image of a robot
Create a picture showing three apples.
create a green tree
Create a logo with a star.
create me an icon of a phone
make a picture of a lion
Make me a picture of a snowman
Make an image of two cups of coffee
make a drawing of a bicycle
produce an image of a mountain
Show me a cat
show me a picture of a frog
show me two pandas on a green background
Show a red apple above a banana
I want a picture of a panda
I want an image of a rocket.
I'd like a picture of a yellow flower
I would like to see a drawing of a horse
I would like you to draw a penguin
I need a picture of a clock.
I need an illustration of a bee for my website
i want to see a dragon
Let me see a picture of a whale
Let me see a tiger
give me a picture of a pizza
Give me an image with five stars
Give me a drawing of an owl
get me a photo of a beach
a red car
a blue car on a yellow background
three yellow stars
two dogs and a cat
A castle in the mountains, sunset, highly detailed
an astronaut riding a horse
a photo of an apple
a picture of a cat
a painting of a forest
Photo of a red bicycle leaning on a wall
picture of a sunflower
image of a moon over the sea
An icon of a house on white
five red hearts in a row
one green apple
a penguin left of a rocket
a star above a moon
a small yellow bird
Sketch a tree
Sketch a cat sleeping on a sofa
paint a sunset
Paint a portrait of a fox
illustrate a bee on a flower
render a glass of water
imagine a purple elephant
imagine an island in the sky
Draw the moon
Draw the same dog again
draw something beautiful
Draw anything you like
please paint a boat
hey, draw a shark
Hi! Can you make a picture of a bird for me?
ok now draw a train
now generate a picture of a snake
would you draw me a spider
will you draw a crown please
kindly draw a key
design a poster with a rocket
Design a logo of a fox
depict a knight and a dragon
another picture of a cat
a new image of a tree
new picture: a blue whale
visualize a city of the future
can I have a picture of a turtle?
can i see a drawing of a ladybug
may I get an image of an ice cream
draw: a lighthouse
generate: two rabbits
Draw a picture with the word HELLO on it
Could we have an illustration of a sheep?
+ draw a car
+ Draw a new picture of a dog
+ Make me a new picture of a dog
+ generate another image of a cat
+ Generate a picture of a house
+ show me a giraffe
+ please draw a boat instead
+ Change the background to pink
+ please make it blue
+ make it blue
+ Make the car red.
+ make the star bigger
+ make him smile
+ make them smaller
+ now add a star
+ add a hat
+ Add a red hat to the dog
+ add two more stars on the left
+ Add snow.
+ paint the car red
+ draw a hat on the dog
+ draw a line under the star
+ remove the tree
+ Remove the background
+ delete the left star
+ erase the dog
+ get rid of the moon
+ take away the cat
+ replace the dog with a cat
+ Replace the star by a moon.
+ swap the dog and the cat
+ swap the colors
+ turn the car blue
+ Turn the dog into a cat
+ turn it into a watercolor
+ turn this into a cartoon
+ change it to green
+ change the color of the car to yellow
+ Change her hair to blond
+ Can you change the background to white?
+ can you make it darker?
+ Could you remove the moon?
+ could you make the picture brighter please?
+ Would you add a sun in the corner?
+ I want the car to be red
+ I'd like the background to be blue
+ I would like it darker
+ move the star to the right
+ put a hat on the cat
+ Put the dog left of the house
+ place a flower in front of the house
+ insert a tree behind the car
+ give the dog a hat
+ Give it a red border
+ rotate it
+ flip the picture
+ mirror the image
+ crop it
+ enlarge the star
+ shrink the moon
+ recolor the flower in purple
+ color the sky orange
+ colour it green
+ fill the background with red
+ set the background to black
+ Edit the picture so that the star is red
+ convert it to black and white
+ Convert the photo to a pencil sketch
+ transform the dog into a robot
+ brighten it
+ blur the background
+ sharpen the image
+ double the number of stars
+ duplicate the star
+ undo
+ undo that
+ bigger
+ without the dog
+ with a hat
+ now with a blue background
+ in green please
+ as a watercolor painting
+ the same but in red
+ the background should be yellow
+ it should be purple
+ more stars
+ less red
+ a bit darker
+ no, the other one should be blue
Could you create something with a dinosaur in it?
Draw us a horse
Let's see a robot
A dragon flying over a castle, digital art
minimalist logo of a mountain
Please show a beach
I want you to paint a lake
+ make the sky pink
+ add sunglasses
+ put glasses on him
+ change his shirt to red
+ can you remove people in the background?
+ Please make the background blurry
+ make it look like winter
+ turn day into night
+ Make this black and white
+ let the dog wear a hat
+ zoom out
+ Remove all text
+ change the text to 'Hello'
+ the dog should wear a hat
+ I don't like the color, make it green
+ nice, but make the car red
+ great! now remove the car
+ try again
+ another one
Draw a table with four chairs
draw a man who is reading a book
Draw the letter A
A cozy cabin in the snow
draw a wolf howling at the moon, with mountains behind
could you show me what a unicorn looks like?
Create a fantasy landscape
make a birthday card with balloons
generate some clouds
I need a logo for my bakery
Design a t-shirt print with a skull
wallpaper with mountains
+ make everything darker
+ add more trees
+ give her blue eyes
+ use a red background
+ add a moon to the sky
+ can it be green?
+ please change it into a painting
+ remove her glasses
+ change style to anime
draw a penguin wearing a scarf
A golden retriever puppy playing in autumn leaves
an astronaut riding a horse, photorealistic
a photo of a bench
a photo of two clocks
a photo of a green cup and a red pizza
a photo of a dog right of a tie
a brown bear in a blue hat
generate an image of a castle on a hill at sunset
please create a watercolor painting of a fishing village
can you make me a picture of a robot?
could you draw an octopus for my daughter
I want an image with two elephants
I'd love a drawing of a lighthouse
i need a logo with a fox
give me a picture of a pineapple
give me a blue bird
show me a dragon
show me what a purple banana looks like
make a cartoon of a cow
make me a poster of a rocket
design an icon of a snail
paint a bowl of fruit
sketch of a sailing boat
cute cat, kawaii style, pastel colours
pixel art of a tree
logo for a bakery with a croissant
four green apples on a table
red bicycle
let me see a giraffe
let's see a turtle with sunglasses
imagine a city under the sea
how about a picture of a whale
now a picture of a mouse
draw it again but with a panda
create a sunset over mountains
+ make the sky purple
+ change it to night
+ turn the dog into a cat
+ add sunglasses to the panda
+ add two more stars
+ remove the person on the left
+ get rid of the background
+ replace the car with a bicycle
+ give the cat a hat
+ make her hair red
+ put a crown on its head
+ the background should be blue
+ blue background please
+ could you remove the text
+ I want the car in green
+ now without the hat
+ a bit smaller
+ as a pencil sketch
+ swap the colours of the two balls
+ move the ball to the right
+ colour the leaves orange
+ crop to the face
draw a monkey
Draw a red apple on a white plate.
draw me an elephant in a bathtub
pls draw a cow
can u draw a cat
Can you paint a snowy forest?
Create an image of an old man reading a newspaper
Create a realistic photo of a tiger
Generate a photo of a plate of pasta
generate image of a wolf
generate picture: a green frog on a leaf
image: two birds on a branch
make a picture with three balls
make me an image of a haunted house
make a sticker of a smiling avocado
I want a drawing of my dog as a superhero
I want to see a picture of a volcano
I'd like an image of a train in the mountains
I need a cartoon picture of a crab
give me an image of a chair
give me a cute hedgehog
show me a photo of a waterfall
show me three mushrooms
Could you show me an orange fish?
a photo of three cell phones
a photo of a bicycle below a parking meter
a photo of a purple elephant
a black cat sitting on a red chair
an oil painting of a ship in a storm
a watercolor of tulips
portrait of an old sailor
a wooden table with a vase of roses
a bear reading a letter
two people at a table, oil painting
green dragon
pink flamingo in a lake
tiny house in a snow globe, isometric, 4k
cyberpunk street at night, neon lights, rain
poster of a jazz concert
surprise me with a picture
+ make the hat green
+ make the whole thing purple
+ make him older
+ turn the apple into an orange
+ turn the background black
+ change the cat to a fox
+ change the season to autumn
+ add a rainbow in the sky
+ add another dog
+ put the car in a desert
+ remove everything except the dog
+ delete the second star
+ take out the tree on the right
+ swap red and blue
+ can you give the man a beard?
+ could the dog be brown?
+ please use a white background
+ I'd like the flower in blue
+ same picture but at night
+ now as an oil painting
Draw a snowman with a carrot nose
draw: a fox in the snow
Draw me two cherries please
Could you draw a lion with a crown?
please generate a realistic picture of a sports car
Generate a cartoon of a dancing banana
generate a blue bus
Generate an owl on a branch at night
generate a logo for a pizza place
create a picture of two kids flying a kite
create a pink butterfly
create a snowy mountain with a cabin
create a 3d render of a teapot
make an image of a turtle on a skateboard
make me a drawing of a mermaid
make a wallpaper with stars
make a green balloon
I want to see a zebra
I want a picture of the Eiffel tower at night
I'd like you to paint a rose
i would like a photo of an old car
I need an icon with a camera
let's make a picture of a monster
let's draw a frog
show me a lighthouse in a storm
show me two yellow ducks
show me a picture of you
give me a photo of a wolf
give me an illustration with mushrooms
how about a drawing of a camel?
can I get a picture of a peacock
can you do a picture of a squirrel?
a photo of a couch left of a toaster
a photo of four handbags
a photo of a yellow bowl and a white sheep
a white sandcastle
a corgi in a wizard hat
three cats on a roof under the full moon
an owl, flat vector style
a lighthouse on a cliff, oil painting, dramatic lighting
medieval knight, digital art
abstract painting with circles
blue whale jumping out of the water
+ make the panda wear a tie
+ make it more colorful
+ make it square
+ change its color
+ change the number of stars to five
+ add a butterfly on the flower
+ add some clouds
+ remove his beard
+ remove that thing in the corner
+ erase the writing
+ replace the sky with a sunset
+ turn it upside down
+ give it a yellow background
+ put it on a beach
+ can you make the eyes bigger?
+ the car should be yellow, not red
+ in the style of van Gogh
draw a giraffe eating leaves
Draw a blue square and a red circle
draw a picture of a beach for me
draw some flowers
Please draw a cat on a skateboard.
Can you draw a ship for me please?
Could you create a picture of a forest?
create an image with a sun and two clouds
create a drawing of a happy robot
Create a photorealistic portrait of a woman
create a purple dragon with wings
generate a cat
Generate a picture of the moon
generate an image of a cake with candles
generate a red umbrella
generate 3 balloons
make a painting of a lake
make a picture of a family of ducks
make a cute bunny
make an orange cat with a hat
please make me a picture of a train
produce a sketch of a bridge
I want an image of a rainbow
I want a drawing with three fish
I'd like to see a penguin
i'd like a photo of a coffee cup
I need a picture of an elephant for my presentation
give me a picture of a moose
give me a sketch of a hand
show me a pink car
show me an image of a kangaroo
show me a snake in the grass
let me see a picture of a shark
can you show me a picture of a koala?
could I get an image of a pirate?
a photo of a giraffe
a photo of a blue cow
a photo of three pizzas
a photo of a toothbrush below a pizza
two red balloons and a kite
a cat sleeping on a pile of books
a steampunk airship above the clouds
a bowl of soup on a table
an elderly woman knitting, soft light
cat
pixel art spaceship
+ make the background darker
+ make the apple green
+ make this look older
+ change the colour of the hat to blue
+ add a tree next to the house
+ add a smile
+ remove the hat
+ remove the words
+ replace the ball with a cube
+ put the panda on a skateboard
+ turn it into a painting
+ convert it to a cartoon
+ could you add some snow please?
+ I want two of them
+ make it night
+ more contrast
+ without the tree
+ turn him into a frog
+ put a hat on the dog
+ now with snow
+ in watercolor
+ swap the cat for a dog
+ flip it
+ can the sky be purple
+ i'd like it darker
+ give her glasses
+ let it rain
+ same but red
+ background: beach
+ move the ball left
+ two more balloons
+ less blurry
+ as a cartoon
+ the car should be green
+ delete the text
+ remove bg
+ add a sun
+ replace the cat with a dog
+ change the background to pink
+ erase the balloon
+ make the sky blue
+ recolor the apple green
+ swap the two animals
+ turn the day into night
+ make her smile
+ can you make the dog brown?
+ could you remove the person on the left?
+ i want the car to be blue
+ let's make it black and white
+ add two stars, please
+ lose the hat
+ colour it in
+ move it up
+ put a star next to the moon
+ change red to blue
+ make the dog a cat
+ change its color to green
+ make everything blue
+ take the hat off
+ put sunglasses on him
+ cover it in snow
+ a different background please
+ make the cat bigger
+ change the time of day to evening
+ more colorful
+ brighter please
+ no background
+ remove everything except the car
+ can we have it in blue
+ could the house be red?
+ the sky more dramatic
+ replace him with a robot
+ insert a moon in the top left corner
+ paint it yellow
+ color the star purple
+ turn the star into a heart
+ place a tree behind the house
+ exchange the apple for a banana
+ i want a green background instead
+ now make it red
+ add a red ball
+ take away the ball
+ now remove the star
+ replace the star with a moon
+ make the star smaller
+ turn the sky orange
+ put a bird on the tree
+ give the dog a bone
+ swap the cat and the dog
+ dye her hair red
+ i want it in black and white
+ could you add a flower?
+ can you change the car into a bus?
+ please erase the text
+ make them all red
+ add snow
+ darker
+ a bit brighter
+ as a painting
+ in pencil style
+ without the hat
+ another color
+ try with green
+ repaint the house white
+ fill the background with stars
+ flip horizontally
+ crop out the man
a cat
cat on a mat
i need a logo for my bakery
sunset over mountains, oil painting
could you make me a wallpaper of mountains
paint a portrait of an old man
generate an image of the eiffel tower
picture of a dog please
drawing of a house
let me see a panda
gimme a unicorn
create art of the sea
render a 3d teapot
imagine a city on mars
produce a photo of a bike
can i get a pic of a whale?
i wanna see a red fox
do a sketch of a bridge
illustrate a fairy tale castle
three blue balls
4 cats
a photo of a man riding a horse
design a poster for a concert
draw me something nice
make a picture with two dogs
please create an image: a boat on a lake
an astronaut riding a horse, photorealistic, 4k
portrait of a woman, studio light
show me a lion
I'd love a picture of a castle
a red circle above a blue square
draw 3 apples
Generate: a green hill
make me a birthday card with balloons
i would like to see a penguin
draw a cat with a hat
a frog and a balloon
make an image with a tree
can you make a drawing of my dog?
could i get an image of the moon
sketch of a lighthouse
create a cartoon fox
two dogs playing
a small house next to a big tree
blue elephant
please draw a snowman
new picture: a snail
picture of two hearts
make a logo with a lion
show me three stars
a yellow star on a pink background
photo of a cup of coffee
illustration of a whale in space
design me a sticker of a cactus
let's have a picture of a turtle
i need an image of a bus
i'd like a drawing of a ghost
give me a picture of a rocket
an owl
five green apples
a robot in the rain
digital art of a wolf
can you generate a cat
i want a picture of two stars
draw the sun
paint a blue bird
make a red balloon
show me a picture of a ship
an image of a crab please
a drawing of a robot
two green turtles
a black cat and a white dog
pink pig
create a scene with three trees
please make me an icon of a key
render an orange fish
imagine a purple house
sketch a chair
let me see an elephant
i'd love to see a rainbow
generate three hearts
a star
""".strip().splitlines()
]
